"""Reference methods that label structures: GFN2-xTB, wB97M-V/def2-TZVPD and SPC/Fw water."""
