"""A recipe of another tool enters; a lorakit recipe leaves, with a word on every key of it.

axolotl.py, llama_factory.py and trl.py are tables of what each key becomes, made of the rules in
rules.py (the documentation's key tables are made from them); translate.py finds out whose file it
is and goes through it; write.py writes the recipe and shows what became of each key.
"""
