"""Shipped recipes, as package data: ``mmbridge ls`` lists them, ``mmbridge cp`` copies one."""
