"""What a checkpoint's files say of a model, without reading its weights."""
