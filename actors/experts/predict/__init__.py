"""Which experts come next: pure predictors behind one interface, the same live and in replay."""
