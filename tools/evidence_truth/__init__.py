"""Which weights a training really touched, and what each evidence source says of them."""
