def problems(split):
    return []
