"""Episodes of several turns with tools, on the engine; three tasks of one turn; and two tools."""
