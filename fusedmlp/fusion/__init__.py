"""fuse, unfuse, compile_backend and the report: how a model comes to run fused ops."""
