"""Training of one model on one device, under the device's memory budget."""
