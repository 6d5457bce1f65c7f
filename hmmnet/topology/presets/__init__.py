"""Machines that come with hmmnet, as TOML files; each says where its figures are from."""
