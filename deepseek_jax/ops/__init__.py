"""The mathematics of the model: arrays in, arrays out, no parameters and no devices."""
