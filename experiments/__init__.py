"""Commands and the configurations they run; nothing in the library imports this."""
