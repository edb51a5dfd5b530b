"""Everything that paints: `draw` makes a whole picture, `paint` gives the values of a map their colours."""
