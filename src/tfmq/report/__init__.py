"""Result values as files: pictures, tables of numbers, arrays."""
