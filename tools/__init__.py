"""Commands around a model: convert it, encode a data set once, measure speed, use it in diffusers."""
