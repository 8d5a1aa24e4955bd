"""From a dense checkpoint to a codec or an MLA model: observe, calibrate, plan, fit."""
