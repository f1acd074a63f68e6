"""Which resident expert to evict: pure policies behind one interface, the same live and in replay."""
