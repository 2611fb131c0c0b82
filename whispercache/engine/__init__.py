"""
Models through faster-whisper and CTranslate2: the only folder that knows either.
"""
