from finetune.recipe.settings import StageSettings
class Settings(StageSettings):
    """x"""
