"""The door of every artifact: what its files may hold, checked as a whole before anything in it is used."""
