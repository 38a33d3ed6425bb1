"""What engine and training share: products, arithmetic between products, and building blocks of compiled kernels."""
