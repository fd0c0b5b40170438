"""Shipped tiny parts, as package data, beside the scripts that rebuild them."""
