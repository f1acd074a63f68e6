"""An expert's bytes: where they lie in a checkpoint, how they are read, what a slot holds."""
