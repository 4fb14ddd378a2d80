"""C sources linked into compiled models: the device ABI, the NPU simulator, an example driver, and bare metal."""
