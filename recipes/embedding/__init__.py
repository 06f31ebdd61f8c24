"""Recipes for one embedding table, by technique."""
