"""What commands ask of DVC and params.yaml."""
