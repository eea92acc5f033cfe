"""Words beside a name that tell whether it is part of a longer one, folded as texts are.

They are for words with a capital, which could be parts of names, if not said otherwise.
"""

# fmt: off
ARTICLES = frozenset((
    "a", "an", "the"
))

# Words of grammar. A name that is one of these (WHO, It) needs its capitals.
GRAMMAR_WORDS = frozenset((
    "a", "about", "above", "across", "after", "against", "all", "along", "although", "am", "among",
    "an", "and", "another", "any", "are", "around", "as", "at", "be", "because", "been", "before",
    "behind", "being", "below", "beneath", "beside", "besides", "between", "beyond", "both", "but",
    "by", "can", "could", "despite", "did", "do", "does", "doing", "down", "during", "each",
    "either", "else", "even", "ever", "every", "few", "for", "from", "had", "has", "have", "having",
    "he", "her", "here", "him", "his", "how", "however", "i", "if", "in", "inside", "instead",
    "into", "is", "it", "its", "just", "many", "may", "me", "might", "more", "most", "much", "must",
    "my", "near", "neither", "never", "no", "nor", "not", "now", "of", "off", "on", "once", "one",
    "only", "onto", "or", "other", "our", "out", "outside", "over", "per", "perhaps", "rather",
    "same", "shall", "she", "should", "since", "so", "some", "still", "such", "than", "that", "the",
    "their", "them", "then", "there", "therefore", "these", "they", "this", "those", "though",
    "through", "throughout", "thus", "till", "to", "today", "together", "too", "toward", "towards",
    "under", "unless", "unlike", "until", "up", "upon", "us", "very", "via", "was", "we", "were",
    "what", "whatever", "when", "whenever", "where", "whereas", "wherever", "whether", "which",
    "while", "who", "whoever", "whom", "whose", "why", "will", "with", "within", "without", "would",
    "yes", "yet", "you", "your"
))

# Other words that often open a sentence: verbs that ask for something and adverbs; then words of
# grammar of German, French, Spanish, Italian, Portuguese and Dutch.
OPENERS = GRAMMAR_WORDS | frozenset((
    "accessed", "according", "actually", "additionally", "afterwards", "again", "ago", "almost",
    "alongside", "already", "also", "alternatively", "always", "amid", "anyway", "apart",
    "apparently", "ask", "assume", "assuming", "basically", "born", "bring", "check", "choose",
    "cite", "classify", "clearly", "compare", "comparing", "complete", "concerning", "consequently",
    "consider", "considering", "contrary", "currently", "dear", "define", "describe", "discuss",
    "draw", "due", "earlier", "elaborate", "especially", "estimate", "eventually", "everyone",
    "everything", "evidently", "except", "excluding", "explain", "fill", "finally", "find", "first",
    "firstly", "following", "former", "formerly", "fortunately", "furthermore", "generally", "give",
    "given", "got", "guess", "hello", "hey", "hi", "historically", "hopefully", "identify",
    "imagine", "incidentally", "included", "includes", "including", "indeed", "initially",
    "interestingly", "know", "last", "lastly", "lately", "later", "learn", "let", "like",
    "likewise", "list", "listen", "locate", "look", "mainly", "maybe", "mean", "meanwhile",
    "mention", "moreover", "mostly", "name", "namely", "nearby", "nearly", "nevertheless", "next",
    "nobody", "none", "nonetheless", "notably", "note", "nothing", "nowadays", "obviously",
    "occasionally", "often", "ok", "okay", "opposite", "originally", "otherwise", "outline", "pick",
    "please", "possibly", "predict", "presently", "presumably", "previously", "probably", "provide",
    "question", "quite", "read", "really", "recall", "recently", "regarding", "remember",
    "reportedly", "respond", "say", "says", "see", "seeing", "several", "shortly", "show",
    "similarly", "simply", "sometimes", "soon", "sorry", "speaking", "specifically", "spell",
    "starring", "state", "subsequently", "suddenly", "suggest", "summarise", "summarize", "suppose",
    "supposing", "surely", "surprisingly", "talk", "talking", "tell", "thank", "thanks", "think",
    "tomorrow", "tonight", "traditionally", "translate", "try", "twice", "typically", "ultimately",
    "understand", "unfortunately", "use", "using", "usually", "versus", "visit", "visiting", "wait",
    "watch", "well", "wonder", "wondering", "write", "yesterday",

    "als", "auch", "auf", "aus", "bei", "beschreibe", "bin", "bist", "da", "dann", "darf", "das",
    "dass", "dem", "den", "der", "des", "die", "dies", "diese", "dieser", "dieses", "ein", "eine",
    "einem", "einen", "einer", "erklare", "es", "fur", "gab", "gehort", "gehorte", "gibt", "gilt",
    "hast", "hat", "hatte", "hier", "ich", "im", "ist", "kann", "kannst", "kennst", "kennt",
    "kommt", "konnen", "liegt", "mein", "mit", "muss", "nach", "nenne", "sind", "soll", "sollte",
    "um", "und", "unser", "vom", "von", "vor", "wann", "war", "waren", "warum", "weisst", "welche",
    "welchem", "welchen", "welcher", "welches", "wem", "wen", "wenn", "wer", "werden", "wie",
    "wieso", "wird", "wo", "woher", "wohin", "womit", "wurde", "wurden", "zu", "zum", "zur",

    "alors", "au", "aussi", "aux", "avec", "avez", "ce", "ces", "cet", "cette", "chez", "combien",
    "comme", "comment", "connais", "connaissez", "dans", "de", "depuis", "donc", "du", "elle", "en",
    "entre", "est", "et", "etaient", "etait", "il", "ils", "je", "la", "le", "les", "leur", "lors",
    "mais", "meme", "notre", "nous", "ont", "ou", "par", "parle", "parlez", "pendant", "peut",
    "peux", "pour", "pourquoi", "pres", "quand", "que", "quel", "quelle", "quelles", "quels", "qui",
    "quoi", "sa", "sans", "selon", "ses", "si", "son", "sont", "sous", "sur", "tu", "un", "une",
    "vers", "voici", "votre", "vous",

    "al", "ante", "asi", "aunque", "como", "con", "cual", "cuales", "cuando", "cuanta", "cuantas",
    "cuanto", "cuantos", "del", "desde", "dime", "donde", "durante", "el", "ella", "ellos", "era",
    "eran", "esa", "ese", "eso", "esta", "estaba", "estan", "este", "esto", "fue", "fueron", "ha",
    "habia", "hacia", "han", "hasta", "hay", "lo", "mas", "mi", "nos", "para", "pero", "por",
    "porque", "puede", "quien", "quienes", "segun", "ser", "sin", "sobre", "su", "sus", "tambien",
    "tiene", "una", "y", "ya",

    "alla", "che", "chi", "ci", "cosa", "dal", "dalla", "dei", "della", "di", "dimmi", "dov",
    "dove", "e", "hanno", "ma", "nei", "nel", "nella", "perche", "piu", "qual", "quale", "quali",
    "quando", "quanti", "quanto", "quindi", "se", "sono", "sul", "sulla", "tra",

    "ao", "aos", "com", "dos", "em", "eram", "essa", "esse", "fale", "foi", "foram", "na", "nas",
    "o", "onde", "os", "pela", "pelo", "quais", "quantos", "quem", "sao", "sem", "sua", "tem",
    "uma",

    "bij", "dan", "dat", "deze", "dit", "door", "een", "er", "hebben", "heeft", "het", "hoe",
    "hoeveel", "kan", "kun", "maar", "met", "naar", "niet", "om", "onder", "ook", "op", "tijdens",
    "toen", "uit", "van", "voor", "waar", "waarom", "wanneer", "welk", "welke", "werd", "wordt",
    "zijn",
))

# A full stop after these ends no sentence, nor does one after a capital letter.
ABBREVIATIONS = frozenset((
    "bros", "capt", "col", "dr", "fr", "ft", "gen", "gov", "hon", "jr", "lt", "mlle", "mme", "mr",
    "mrs", "ms", "mt", "prof", "rep", "rev", "sen", "sgt", "sr", "st", "sta", "ste"
))

# Offices, professions, forms of address and kinds of works. A name may follow them, and that of a
# place after `of`: the King of Denmark.
OFFICES = frozenset((
    "actor", "actress", "admiral", "album", "alcalde", "ambassador", "anthropologist", "archbishop",
    "archduke", "artist", "astronaut", "author", "baron", "baroness", "bishop", "brigadier",
    "brother", "bundeskanzler", "bundesprasident", "burgermeister", "captain", "cardinal", "ceo",
    "cfo", "chairman", "chairwoman", "chancellor", "chef", "chief", "coach", "colonel", "commander",
    "commissioner", "comrade", "congressman", "congresswoman", "coo", "count", "countess", "cto",
    "dame", "deputy", "detective", "director", "doctor", "don", "dona", "dr", "duchess", "duke",
    "earl", "editor", "emperor", "empress", "engineer", "episode", "father", "film", "filmmaker",
    "founder", "frau", "general", "governor", "guitarist", "herr", "inspector", "inventor",
    "journalist", "judge", "kanzler", "king", "konig", "konigin", "lady", "lieutenant", "lord",
    "madame", "mademoiselle", "maestro", "maire", "major", "marquess", "marquis", "marshal",
    "mayor", "minister", "ministre", "miss", "mister", "mlle", "mme", "monarch", "monsieur",
    "movie", "mr", "mrs", "ms", "musician", "novel", "novelist", "officer", "painter", "patriarch",
    "philosopher", "physicist", "player", "poet", "pope", "premier", "president", "presidente",
    "priest", "prime", "prince", "princess", "producer", "prof", "professor", "queen", "rabbi",
    "regina", "reina", "reine", "reporter", "representative", "reverend", "rey", "roi", "ruler",
    "scientist", "secretary", "senator", "senor", "senora", "sergeant", "shah", "sheikh", "sheriff",
    "show", "sindaco", "singer", "sir", "song", "sultan", "treasurer", "tsar", "uncle", "vicar",
    "vice", "viceroy", "viscount", "writer"
))

# Offices that make a name of their own with `of`: the Prince of Wales.
NOBLES = frozenset((
    "baron", "baroness", "count", "countess", "dame", "duchess", "duke", "earl", "lady", "lord",
    "marquess", "marquis", "prince", "princess", "shah", "sir", "viscount"
))

# What is asked about the name after `of`: the Capital of France, History of Paris.
ASPECTS = frozenset((
    "age", "alcaldes", "anthem", "area", "average", "beginning", "birthplace", "border", "borders",
    "capital", "capitale", "capitals", "cause", "causes", "center", "centre", "children", "cities",
    "citizens", "city", "climate", "coast", "color", "colour", "consequences", "continent", "cost",
    "country", "creation", "creator", "culture", "currency", "daughter", "death", "definition",
    "demonym", "description", "design", "designer", "destruction", "discovery", "east", "economy",
    "einwohner", "elevation", "end", "establishment", "example", "examples", "flag", "foundation",
    "founders", "founding", "geography", "geschichte", "half", "hauptstadt", "headquarters",
    "heart", "height", "histoire", "historia", "history", "home", "husband", "idioma", "industry",
    "inhabitants", "invention", "language", "languages", "leader", "leaders", "length", "life",
    "location", "logo", "majority", "maker", "manager", "map", "mascot", "meaning", "member",
    "members", "middle", "moneda", "most", "mother", "motto", "name", "names", "nationality",
    "nickname", "north", "number", "occupation", "origin", "origins", "outskirts", "owner",
    "owners", "parent", "part", "parts", "people", "photo", "picture", "poblacion", "population",
    "position", "price", "production", "profession", "purpose", "rank", "rate", "region",
    "religion", "residents", "rest", "role", "rule", "shape", "side", "sister", "size", "slogan",
    "son", "south", "speed", "spouse", "start", "states", "status", "storia", "streets", "style",
    "summary", "superficie", "symbol", "synonym", "time", "timezone", "tourism", "type", "types",
    "use", "value", "version", "view", "weather", "website", "weight", "west", "wife"
))

# Words in lower case that join capitalised ones to one name, and articles after them.
PARTICLES = frozenset((
    "&", "af", "av", "bar", "ben", "bin", "bint", "d", "da", "de", "degli", "dei", "del", "dell",
    "della", "delle", "dello", "des", "di", "du", "ibn", "of", "ter", "van", "vom", "von"
))
PARTICLE_ARTICLES = frozenset((
    "de", "dem", "den", "der", "het", "la", "las", "le", "les", "los", "the"
))

# Articles in lower case that a hyphen joins to a name.
ARABIC_ARTICLES = frozenset((
    "ad", "al", "an", "ar", "as", "at", "az", "el", "ul"
))

# Words that `the` joins to a name: Alexander the Great.
EPITHETS = frozenset((
    "apostle", "bald", "baptist", "bold", "brave", "confessor", "conqueror", "elder", "evangelist",
    "fair", "fat", "good", "great", "impaler", "lame", "lion", "magnificent", "martyr", "pious",
    "proud", "tall", "terrible", "unready", "wise", "younger"
))

# Words before an apostrophe, after which a name begins: l'Allemagne.
ELISIONS = frozenset((
    "all", "d", "dall", "dell", "j", "l", "m", "n", "nell", "qu", "s", "sull", "t", "un"
))

# What may follow an apostrophe after a name: in English, then in Turkish.
CLITICS = frozenset((
    "a", "d", "da", "dan", "de", "den", "e", "i", "in", "la", "le", "ll", "m", "nin", "nun", "re",
    "s", "ta", "tan", "te", "ten", "u", "un", "ve", "ya", "ye", "yi", "yla", "yle", "yu"
))

# Forms of companies, after which a name is the same.
COMPANY_FORMS = frozenset((
    "ab", "ag", "as", "asa", "bv", "co", "com", "corp", "gmbh", "inc", "incorporated", "kg",
    "limited", "llc", "llp", "ltd", "nv", "oy", "plc", "pty", "sa", "se", "spa", "srl"
))

# Names of times, which stand beside names of other things.
TIMES = frozenset((
    "april", "august", "december", "february", "friday", "january", "july", "june", "march", "may",
    "monday", "november", "october", "saturday", "september", "sunday", "thursday", "tuesday",
    "wednesday"
))

# Offices that are told after the name of a place or company: Google CEO.
OFFICES_AFTER = frozenset((
    "ceo", "cfo", "chairman", "chancellor", "coo", "cto", "mayor", "minister", "president"
))

# Words in lower case that make a place's name that of something in it.
INSTITUTIONS = frozenset((
    "airport", "bridge", "castle", "cathedral", "college", "hospital", "museum", "national",
    "railroad", "railway", "stadium", "station", "university"
))

# Words after the pronoun `I`; else a capital I is a numeral.
PRONOUN_VERBS = frozenset((
    "am", "believe", "came", "can", "could", "did", "do", "feel", "felt", "found", "had", "have",
    "just", "know", "like", "live", "lived", "love", "made", "met", "need", "never", "often", "saw",
    "should", "stayed", "studied", "think", "thought", "visited", "want", "was", "went", "will",
    "wish", "work", "worked", "would"
))

# Words that are in lower case also in a headline.
HEADLINE_WORDS = frozenset((
    "a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"
))
# fmt: on
