"""Commands that make data and small models, and measure heads."""
