"""How fast anycard moves checkpoints, beside what people use today and beside bare loops without any format."""
