"""What several rooms of tests use: places, facts, reporters, sessions and runs; import each name from its module."""
