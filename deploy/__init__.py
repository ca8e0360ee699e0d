"""The outside: gateway, command line, settings and the Ray application."""
