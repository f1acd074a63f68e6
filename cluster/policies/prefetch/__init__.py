"""Which experts come next: predictors behind one interface."""
