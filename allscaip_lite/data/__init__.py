"""Data sets in OMol25's format (`.aselmdb`): read, write, convert, download, describe, batch."""

from allscaip_lite.data.aselmdb import Dataset, Subset, split_by_molecule, write_aselmdb
from allscaip_lite.data.download import fetch

__all__ = ["Dataset", "Subset", "fetch", "split_by_molecule", "write_aselmdb"]
