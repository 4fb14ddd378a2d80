"""C sources linked into compiled models: the device ABI (`qrt.h`) and the NPU simulator."""
