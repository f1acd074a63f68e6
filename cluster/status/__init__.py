"""What processes say of themselves."""
