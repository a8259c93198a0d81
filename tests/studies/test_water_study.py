"""One protocol for every model: what it runs, how it goes on, and what its numbers say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.calculators.calculator import Calculator, all_changes

pytest.importorskip("MDAnalysis")

from allscaip_lite.errors import RunError
from allscaip_lite.files import locked
from allscaip_lite.machine import processor_name
from allscaip_lite.md.dynamics import read_log
from allscaip_lite.md.observables import (
    Estimate,
    average,
)
from allscaip_lite.spcfw import SPCFw
from docs.studies.water import run as water_study
from docs.studies.water.run import (
    STAGE_OF,
    TARGETS,
    WaterBenchmark,
    collect,
    compare,
    jackknife,
    main,
    on_own_frames,
    pool,
    read_result,
    read_results,
    reweighted_difference,
    run_water_benchmark,
    verdict,
    write_number,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHORT = WaterBenchmark(
    waters=8,
    prepare=80.0,
    equilibrate=80.0,
    settle=40.0,
    npt=160.0,
    nvt=200.0,
    nve=160.0,
    gas=400.0,
)
OPTIONS = "--waters 8 --prepare 80fs --equilibrate 80fs --nve 160fs --gas 400fs --quiet".split()


class Pushed(SPCFw):
    """The teacher with a force too much, which no energy stands behind."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        positions = self.atoms.positions - self.atoms.positions.mean(0)
        turned = np.cross([0.0, 0.0, 0.02], positions)  # eV/Å
        self.results["forces"] = self.results["forces"] + turned - turned.mean(0)


class Dropped(Calculator):
    """A model that holds nothing together: atoms are pushed apart by a constant force."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        away = self.atoms.positions - self.atoms.positions.mean(0)
        self.results = dict.fromkeys(("energy", "free_energy"), 0.0)
        self.results |= {"forces": 1e3 * away, "stress": np.zeros(6)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spcfw")
    assert run_water_benchmark(SPCFw(), SHORT, folder, "spcfw", progress=False) == {}
    return folder


def test_every_stage_runs_in_its_ensemble_from_one_start(teacher):
    for stage, ensemble in (("npt", "npt"), ("nvt", "nvt"), ("nve", "nve"), ("gas", "nvt")):
        plan = json.loads((teacher / stage / "settings.json").read_text())
        assert plan["ensemble"] == ensemble and plan["temperature"] == 298.15
    first = {
        stage: read_log(teacher / stage)["potential_eV"][0]
        for stage in ("equilibrate", "npt", "nvt", "nve")
    }
    last = read_log(teacher / "equilibrate")["potential_eV"][-1]
    assert all(first[stage] == pytest.approx(last, abs=1e-9) for stage in ("npt", "nvt", "nve"))
    assert first["equilibrate"] == pytest.approx(read_log(teacher / "prepare")["potential_eV"][-1])


def test_all_that_short_runs_allow_is_collected(teacher):
    found = collect(teacher)
    keys = set(found["observables"])
    assert {"density_g_cm3", "vaporisation_kJ_mol", "pressure_nvt_bar", "dielectric"} <= keys
    assert {"gas_energy_kJ_mol", "drift_meV_atom_ps", "OO_height"} <= keys
    assert "diffusion_1e-9_m2_s" not in keys  # 0.2 ps
    assert found["lengths_ps"]["npt"] == pytest.approx(0.16)
    gas, liquid, heat, bare = (
        found["observables"][f"{name}_kJ_mol"].value
        for name in ("gas_energy", "liquid_energy", "vaporisation", "vaporisation_unstrained")
    )
    rt = 8.314462618e-3 * 298.15
    assert heat == pytest.approx(gas - liquid + rt, abs=1e-4)
    assert bare == pytest.approx(-liquid + rt, abs=1e-4)
    log = read_log(teacher / "npt")
    counted = log["density_g_cm3"][log["time_ps"] > 0.0399]  # past `settle`
    blocks = len(counted) // 5 * 5
    assert found["observables"]["density_g_cm3"].value == pytest.approx(counted[-blocks:].mean())
    json.dumps(found)


def test_a_stopped_or_prolonged_run_is_the_uninterrupted_one(teacher, tmp_path):
    shorter = WaterBenchmark(**{**vars(SHORT), "npt": 80.0, "nvt": 40.0, "nve": 40.0, "gas": 80.0})
    run_water_benchmark(SPCFw(), shorter, tmp_path, "spcfw", ("nvt",), progress=False)
    assert not (tmp_path / "npt").exists() and not (tmp_path / "gas").exists()
    assert "density_g_cm3" not in collect(tmp_path)["observables"]
    run_water_benchmark(SPCFw(), shorter, tmp_path, "spcfw", progress=False)
    run_water_benchmark(SPCFw(), SHORT, tmp_path, "spcfw", progress=False)
    for stage in ("npt", "nvt", "nve", "gas"):
        ours, whole = read_log(tmp_path / stage), read_log(teacher / stage)
        assert np.array_equal(ours["potential_eV"], whole["potential_eV"]), stage


def test_a_folder_belongs_to_one_protocol_and_one_model(teacher):
    with pytest.raises(RunError, match="another name"):
        run_water_benchmark(SPCFw(), SHORT, teacher, "student", progress=False)
    with pytest.raises(RunError, match="another timestep"):
        changed = WaterBenchmark(**{**vars(SHORT), "timestep": 0.5})
        run_water_benchmark(SPCFw(), changed, teacher, "spcfw", progress=False)
    with locked(teacher), pytest.raises(RunError, match="another process works in"):
        run_water_benchmark(SPCFw(), SHORT, teacher, "spcfw", progress=False)


def test_what_explodes_is_told_and_does_not_stop_the_rest(tmp_path):
    exploded = run_water_benchmark(Dropped(), SHORT, tmp_path, "bad", progress=False)
    assert set(exploded) == {"gas", "equilibrate"}
    assert "exploded at step" in exploded["gas"]
    found = collect(tmp_path)  # what there is
    assert "density_g_cm3" not in found["observables"]
    assert found["exploded"] == ["equilibrate", "gas"]
    assert "`bad`: gas exploded after" in compare([found])


def test_forces_without_an_energy_show_in_the_drift(teacher, tmp_path):
    run_water_benchmark(Pushed(), SHORT, tmp_path, "pushed", ("nve",), progress=False)
    drift = collect(tmp_path)["observables"]["drift_meV_atom_ps"]
    sound = collect(teacher)["observables"]["drift_meV_atom_ps"]
    assert abs(drift.value) > 20 * abs(sound.value)


def in_two_blocks(*given: np.ndarray, **options: np.ndarray) -> Estimate:
    """`reweighted_difference` for runs as short as these."""
    return reweighted_difference(*given, **options, blocks=2)


class Swollen(SPCFw):
    """The teacher with 500 bar more, and 0.01 eV more for each molecule."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] += 0.01 * len(self.atoms) / 3
        self.results["free_energy"] = self.results["energy"]
        if "stress" in self.results:
            self.results["stress"] = self.results["stress"] - 500 * units.bar * np.eye(3, 6).sum(0)


def test_a_pressure_that_is_too_high_is_seen_on_the_models_own_structures(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(water_study, "reweighted_difference", in_two_blocks)
    run_water_benchmark(Swollen(), SHORT, tmp_path, "swollen", ("nvt",), progress=False)
    beside = on_own_frames(tmp_path / "nvt")
    assert beside["time_ps"] == pytest.approx(0.04 * np.arange(6))  # every 40 fs of 200
    assert beside["pressure_bar"] == pytest.approx(500 * np.ones(6), abs=1e-3)
    assert beside["potential_eV"] == pytest.approx(0.01 * SHORT.waters * np.ones(6), abs=1e-9)
    found = collect(tmp_path)["observables"]
    assert found["pressure_beside_bar"].value == pytest.approx(500, abs=1e-3)
    # of the ensembles too: energies that are all too high by the same leave the teacher's as it is
    assert found["pressure_weighted_bar"] == pytest.approx((500, 0), abs=1e-3)
    assert found["OO_height_beside"] == pytest.approx((0, 0), abs=1e-9)
    assert "pressure_beside_bar" not in collect(teacher)["observables"]
    # a run that goes on while it is collected has more structures when it is read again
    grown = {name: np.append(values, values[-1]) for name, values in beside.items()}
    grown["number"][-1] = len(beside["number"])
    monkeypatch.setattr(water_study, "on_own_frames", lambda folder: grown)
    assert collect(tmp_path)["observables"]["OO_height_beside"] == found["OO_height_beside"]


def test_the_density_by_weights_takes_the_settled_structures(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energies that are all too high by the same leave the teacher's ensemble as it is."""
    asked = []

    def weigh(series: np.ndarray, excess: np.ndarray, temperature: float) -> Estimate:
        asked.append((series, excess))
        return in_two_blocks(series, excess, temperature)

    monkeypatch.setattr(water_study, "reweighted_difference", weigh)
    run_water_benchmark(Swollen(), SHORT, tmp_path, "swollen", ("npt",), progress=False)
    found = collect(tmp_path)
    assert found["observables"]["density_beside_g_cm3"] == pytest.approx((0, 0), abs=1e-9)
    log = read_log(tmp_path / "npt")
    kept = log["time_ps"][::4] >= SHORT.settle / 1000  # a structure every fourth line
    assert asked[0][0] == pytest.approx(log["density_g_cm3"][::4][kept])
    assert asked[0][1] == pytest.approx(0.01 * SHORT.waters * np.ones(kept.sum()), abs=1e-9)
    series = found["series"]["beside"]
    assert series["density_g_cm3"] == pytest.approx(asked[0][0], rel=1e-6)
    assert series["potential_eV"] == pytest.approx(asked[0][1], rel=1e-6)
    assert "density_beside_g_cm3" not in collect(teacher)["observables"]


def test_energies_that_change_with_the_volume_are_a_pressure() -> None:
    volume = np.linspace(900, 1000, 40)
    noise = np.random.default_rng(0).normal(size=40)
    push = jackknife(
        water_study._slope_as_pressure, volume, -300 * units.bar * volume + 1e-3 * noise
    )
    assert abs(push.value - 300) < 3 * push.error < 60


def test_the_model_is_asked_about_the_teachers_structures(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that pulls boxes together is denser, both by its run and by the teacher's."""
    monkeypatch.setattr(water_study, "TEACHER_FRAMES_EVERY", 0.08)

    class Pulled(SPCFw):
        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            pull = 2000 * units.bar  # as if of a pressure from outside
            if "stress" in self.results:  # in a box
                self.results["energy"] += pull * self.atoms.get_volume()
                self.results["stress"] = self.results["stress"] + pull * np.eye(3, 6).sum(0)

    mine = tmp_path / "pulled"
    run_water_benchmark(Pulled(), SHORT, mine, "pulled", ("gas",), progress=False)
    water_study.on_teacher_frames(Pulled(), mine, [teacher], progress=False)
    asked = {stage: water_study._read_teacher_frames(mine, stage) for stage in ("npt", "nvt")}
    assert asked["npt"]["time_ps"] == pytest.approx([0.04, 0.12])
    assert asked["nvt"]["time_ps"] == pytest.approx([0.0, 0.08, 0.16])
    for answers in asked.values():
        volume = SHORT.waters * 18.01528 / 0.602214 / answers["density_g_cm3"]
        assert answers["potential_eV"] == pytest.approx(2000 * units.bar * volume, rel=1e-4)
        assert answers["excess_bar"] == pytest.approx(-2000 * np.ones(len(volume)), abs=1e-3)
    monkeypatch.setattr(water_study, "reweighted_difference", in_two_blocks)
    found = collect(mine)["observables"]
    assert found["density_asked_g_cm3"].value > 0
    assert found["pressure_asked_bar"] == pytest.approx((-2000, 0), abs=1e-2)
    assert found["OO_height_asked"] == pytest.approx((0, 0), abs=1e-9)

    with pytest.raises(RunError, match="is a run of pulled, not of spcfw"):
        water_study.on_teacher_frames(Pulled(), mine, [mine], progress=False)
    other = tmp_path / "other"
    run_water_benchmark(
        Pulled(), replace(SHORT, waters=9), other, "pulled", ("gas",), progress=False
    )
    with pytest.raises(RunError, match="with another waters"):
        water_study.on_teacher_frames(Pulled(), other, [teacher], progress=False)
    run_water_benchmark(SPCFw(), SHORT, tmp_path / "gas", "spcfw", ("gas",), progress=False)
    with pytest.raises(RunError, match="no npt or nvt run in .*gas"):
        water_study.on_teacher_frames(Pulled(), mine, [tmp_path / "gas"], progress=False)


def test_a_model_that_likes_full_first_shells_has_a_higher_peak(teacher: Path, tmp_path: Path):
    """From the teacher's run: energies that fall by kT as g(r) at its peak rises by 1."""
    run_water_benchmark(Swollen(), SHORT, tmp_path, "likes", ("gas",), progress=False)
    kT = units.kB * SHORT.temperature
    rng = np.random.default_rng(0)
    peak = 3.0 + 0.3 * rng.normal(size=4000)
    g = np.stack([0 * peak, 0.9 * peak, peak, 0.9 * peak, 0 * peak], axis=1)
    steady = {"pressure_bar": peak, "excess_bar": 100 + 0 * peak, "time_ps": np.arange(4000)}
    np.savez(
        tmp_path / water_study.TEACHER_FRAMES.format("nvt"),
        **{**steady, "g_OO": g, "potential_eV": -kT * peak},
    )
    found = collect(tmp_path)["observables"]
    for key, more in (("OO_height_asked", 0.0), ("pressure_asked_bar", 100.0)):
        away, error = found[key]  # weights exp(x) move the mean of normal values by their variance
        assert abs(away - more - 0.3**2) < 3 * error and 0 < error < 0.01, key


def test_the_error_of_an_average_is_not_made_small_by_short_blocks():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1000)
    slow = np.convolve(noise, np.ones(50) / np.sqrt(50), mode="valid")
    found = average(slow, blocks=900)
    assert found.error > 3 * slow.std() / np.sqrt(len(slow))
    white = average(noise)
    assert white.value == pytest.approx(noise.mean()) and 0.5 < white.error * 1000**0.5 < 2.5


# --- tables -------------------------------------------------------------------------------------


def made_up(name: str, **values: tuple[float, float]) -> dict:
    return {
        "name": name,
        "protocol": {"waters": 32, "seed": 0},
        "observables": {key: Estimate(*pair) for key, pair in values.items()},
        "lengths_ps": {"npt": 10.0},
        "hours": {"npt": 0.5},
        "correlation_ps": {},
        "distributions": {},
        "series": {},
        "exploded": [],
    }


def test_runs_with_other_seeds_count_as_one():
    g = {"r": [1.0, 2.0], "g": [0.0, 3.0], "error": [0.0, 0.3]}
    one = made_up("student", density_g_cm3=(1.0, 0.04), OO_height=(3.0, 0.1))
    one |= {"lengths_ps": {"npt": 10.0, "nvt": 5.0}, "distributions": {"OO": g}}
    one |= {"series": {"npt": {"time_ps": [0.0, 10.0]}}, "correlation_ps": {"density": 1.0}}
    two = made_up("student", density_g_cm3=(1.04, 0.02), drift_meV_atom_ps=(0.1, 0.01))
    two |= {"lengths_ps": {"npt": 30.0, "nve": 7.0}, "hours": {"npt": 1.5}, "exploded": ["nve"]}
    two |= {"series": {"npt": {"time_ps": [0.0, 30.0]}}, "correlation_ps": {"density": 2.0}}
    two["protocol"] = {"waters": 32, "seed": 1}
    both = pool([one, two])
    value, error = both["observables"]["density_g_cm3"]
    assert value == pytest.approx((10 * 1.0 + 30 * 1.04) / 40)
    assert error == pytest.approx(math.hypot(10 * 0.04, 30 * 0.02) / 40)
    assert both["observables"]["OO_height"] == (3.0, 0.1)  # only one has it
    assert both["observables"]["drift_meV_atom_ps"] == (0.1, 0.01)
    assert both["lengths_ps"] == {"npt": 40.0, "nvt": 5.0, "nve": 7.0}
    assert both["hours"]["npt"] == 2.0 and both["exploded"] == ["nve"]
    assert both["series"]["npt"]["time_ps"][-1] == 30.0
    assert both["correlation_ps"]["density"] == 2.0
    assert both["distributions"]["OO"] == g

    three = made_up("student", gas_energy_kJ_mol=(4.0, 0.3), liquid_energy_kJ_mol=(-43.0, 0.8))
    three["protocol"] = {"waters": 32, "seed": 3, "temperature": 300.0}
    three["lengths_ps"]["gas"] = 5.0
    four = made_up("student", liquid_energy_kJ_mol=(-42.0, 0.4))
    four |= {"protocol": {**three["protocol"], "seed": 4}, "lengths_ps": {"npt": 30.0}}
    found = pool([three, four])["observables"]
    heat = 4.0 + (43.0 + 3 * 42.0) / 4 + 2.494339  # RT at 300 K
    error = math.hypot(0.8, 3 * 0.4) / 4
    assert found["vaporisation_kJ_mol"] == pytest.approx((heat, math.hypot(0.3, error)), rel=1e-5)
    at_rest = found["vaporisation_unstrained_kJ_mol"]
    assert at_rest == pytest.approx((heat - 4.0, error), rel=1e-5)

    twin = {**one, "protocol": {"waters": 32, "seed": 2}}
    halved = pool([one, twin])["distributions"]["OO"]
    assert halved["g"] == pytest.approx([0.0, 3.0])
    assert halved["error"] == pytest.approx([0.0, 0.3 / math.sqrt(2)])

    for other in ({"waters": 32, "seed": 0}, {"waters": 64, "seed": 1}):
        with pytest.raises(RunError, match="same settings and different seeds"):
            pool([one, {**two, "protocol": other}])


def test_files_of_different_protocols_are_not_compared(tmp_path):
    base = {"observables": {}, "lengths_ps": {}, "hours": {}, "distributions": {}, "series": {}}
    for name, step, seed in (("a", 1.0, 0), ("b", 1.0, 1), ("c", 0.5, 0)):
        result = {**base, "name": name, "protocol": {"timestep": step, "seed": seed}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    files = [tmp_path / f"{name}.json" for name in "abc"]
    assert [result["name"] for result in read_results(files[:2])] == ["a", "b"]
    with pytest.raises(RunError, match=r"c.json was made with another timestep"):
        read_results(files)


@pytest.mark.parametrize("stage", ["gas", "npt", "nvt", "nve"])
def test_results_are_weighted_by_the_stage_that_they_are_measured_in(teacher, tmp_path, stage):
    for name in ("protocol.json", stage):
        (tmp_path / name).symlink_to(teacher / name)
    found = collect(tmp_path)["observables"]
    assert found and {STAGE_OF.get(key, "nvt") for key in found} == {stage}


def test_a_verdict_knows_its_error():
    teacher = Estimate(1.0, 0.003)
    away, error, word = verdict("density_g_cm3", Estimate(1.01, 0.004), teacher)
    assert (away, error, word) == (pytest.approx(0.01), pytest.approx(0.005), "met")
    assert verdict("density_g_cm3", Estimate(0.95, 0.004), teacher)[2] == "missed"
    assert verdict("density_g_cm3", Estimate(0.981, 0.004), teacher)[2] == "open"
    beside = verdict("density_beside_g_cm3", Estimate(-0.018, 0.001), Estimate(0.9, 0.5))
    assert beside == (pytest.approx(-0.02), pytest.approx(0.001 / 0.9), "open")
    # a drift is far from zero or not, whatever the teacher's
    assert verdict("drift_meV_atom_ps", Estimate(0.3, 0.01), Estimate(0.3, 0.01))[2] == "missed"
    assert set(TARGETS) <= set(water_study.ROWS)


def test_numbers_are_written_to_the_digits_of_their_error():
    assert write_number(Estimate(0.99712, 0.0123)) == "0.997 ± 0.012"
    assert write_number(Estimate(47.21, 0.31)) == "47.21 ± 0.31"
    assert write_number(Estimate(-250.4, 91.0)) == "-250 ± 91"
    assert write_number(Estimate(12.3456, math.nan)) == "12.3"


def test_tables_have_model_teacher_and_experiment():
    table = compare(
        [
            made_up("student", density_g_cm3=(1.05, 0.001)),
            made_up("spcfw", density_g_cm3=(1.0, 0.001), OO_peak_A=(2.75, 0.01)),
        ]
    )
    head, _, line = table.splitlines()[:3]
    assert head == "| | `student` | teacher, SPC/Fw | experiment |"
    assert line == "| density, g/cm³ | 1.0500 ± 0.0010 | 1.0000 ± 0.0010 | 0.997 |"
    assert "5.00 ± 0.14 %: missed" in table
    assert "| npt | 10 (0.50) | 10 (0.50) |" in table
    assert "dielectric" not in table  # nobody has it


def test_the_command_writes_files_that_the_table_reads(tmp_path, capsys):
    out, page = tmp_path / "spcfw.json", tmp_path / "water.md"
    plain = [*OPTIONS, "--folder", str(tmp_path / "runs"), "--out", str(out)]
    assert main(["run", "spcfw", *plain, "--stages", "nve", "gas"]) == 0
    assert "drift_meV_atom_ps" in capsys.readouterr().out
    found = read_result(out)
    assert found["name"] == "spcfw" and isinstance(
        found["observables"]["drift_meV_atom_ps"], Estimate
    )
    assert found["machine"]["threads"] >= 1 and "torch" in found["machine"]["versions"]
    assert found["machine"]["stages"]["nve"] == [processor_name()]
    assert max(map(len, out.read_text().splitlines())) > 200  # a list is one line
    again = tmp_path / "again.json"
    plain[plain.index(str(out))] = str(again)
    assert main(["run", "spcfw", *plain, "--collect"]) == 0  # nothing new is run
    assert read_result(again)["lengths_ps"] == found["lengths_ps"]
    assert main(["table", str(out), "--out", str(page)]) == 0
    assert "drift of the energy" in page.read_text()
    assert main(["table", str(out), str(again), "--out", str(page)]) == 2  # one run, twice
    assert "different seeds" in capsys.readouterr().err
    assert main(["run", "spcfw", *plain, "--waters", "9"]) == 2
    assert "another waters" in capsys.readouterr().err
    out.write_text("{}")
    assert main(["table", str(out), "--out", str(page)]) == 2
    assert "no result of the water benchmark" in capsys.readouterr().err


# --- what the lesson opens ------------------------------------------------------------------------


def test_the_lesson_s_model_is_lite_water_unless_another_is_named(monkeypatch, capsys):
    from allscaip_lite.notebook.lessons import open_model

    monkeypatch.delenv("ALLSCAIP_MODEL", raising=False)
    model = open_model("conservative", default="lite-water", device="cpu")
    assert capsys.readouterr().out.startswith("lite-water: 690,160 parameters")
    assert model.config.conservative and model.config.stress
    monkeypatch.setenv("ALLSCAIP_MODEL", "lite")
    open_model("conservative", default="lite-water", device="cpu")
    assert capsys.readouterr().out.startswith("lite: ")


def test_the_bundled_weights_carry_their_errors_and_how_they_were_trained():
    from allscaip_lite.checkpoints.native import read_card

    card, local = read_card("lite-water"), read_card("lite-water-local")
    assert "conservative" in card["trained"] and "without its node attention" in local["trained"]
    ours, theirs = (found["errors"]["water_npt"] for found in (card, local))
    assert ours["force_mae"] < 15  # the goal, meV/Å
    assert ours["energy_mae"] < 0.5  # likewise, meV/atom
    assert theirs["force_mae"] > ours["force_mae"]


def test_the_page_and_what_the_lesson_reads_are_those_of_the_files_beside_them(tmp_path):
    root = Path(__file__).resolve().parents[2] / "docs" / "studies" / "water"
    files = map(str, sorted((root / "results").glob("*.json")))
    (tmp_path / "water.md").write_text((root / "README.md").read_text())
    out = ["--out", str(tmp_path / "water.md"), "--pooled", str(tmp_path / "pooled.json")]
    assert main(["table", *files, *out]) == 0
    for made, kept in (("water.md", "README.md"), ("pooled.json", "pooled.json")):
        assert (tmp_path / made).read_text() == (root / kept).read_text()
