"""Turn rewards of whole folders of conversations."""
