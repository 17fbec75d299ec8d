"""The device inside an emulator's own process: register models and what drives them."""
