"""CPU kernels behind one interface: a compiled one and a plain torch one that is always correct."""
