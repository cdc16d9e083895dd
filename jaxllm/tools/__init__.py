"""Programs that look at a run or its surroundings; nothing imports them."""
