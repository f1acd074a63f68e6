"""Which resident expert to evict: policies behind one interface."""
