// Never built: its flags, as Meson has them, are what the tests compile with that must see the compiler's answer.
