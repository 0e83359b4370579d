"""placeholder until the data branch lands"""
