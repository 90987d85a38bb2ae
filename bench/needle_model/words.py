"""Words that keys and values are made of. They are part of the task: a change makes another task of the same seed."""


def _list(text: str, separator: str = " ") -> list[str]:
    return " ".join(text.split()).split(separator)


CITIES = _list(
    """
    Aberdeen | Adelaide | Albany | Amsterdam | Anchorage | Antwerp | Athens | Atlanta | Auckland | Austin |
    Baltimore | Bangkok | Barcelona | Belfast | Belgrade | Bergen | Berlin | Bogota | Bologna | Bombay | Boston |
    Brisbane | Bristol | Brussels | Bucharest | Budapest | Buenos Aires | Buffalo | Cairo | Calcutta | Cape Town |
    Caracas | Cardiff | Charleston | Chicago | Cleveland | Cologne | Columbus | Copenhagen | Cork | Cracow | Dallas
    | Damascus | Delhi | Denver | Detroit | Dresden | Dublin | Dundee | Durban | Edinburgh | El Paso | Florence |
    Frankfurt | Geneva | Genoa | Ghent | Glasgow | Granada | Grenoble | Halifax | Hamburg | Hanover | Havana |
    Helsinki | Hong Kong | Houston | Istanbul | Jakarta | Johannesburg | Kansas City | Karachi | Kingston | Kyoto |
    Lagos | Las Vegas | Leeds | Leipzig | Lima | Lisbon | Liverpool | London | Long Beach | Los Angeles | Lyon |
    Madrid | Malaga | Manchester | Manila | Marseille | Melbourne | Memphis | Mexico City | Miami | Milan |
    Milwaukee | Minneapolis | Montreal | Moscow | Mumbai | Munich | Nagoya | Nairobi | Naples | Nashville |
    New Delhi | New Haven | New Orleans | New York | Newcastle | Nottingham | Oklahoma City | Omaha | Orlando |
    Osaka | Oslo | Ottawa | Oxford | Palermo | Panama City | Paris | Perth | Philadelphia | Phoenix | Pittsburgh |
    Portland | Porto | Prague | Quebec | Quito | Richmond | Rio de Janeiro | Riga | Rome | Rotterdam | Sacramento |
    Salt Lake City | Salzburg | San Antonio | San Diego | San Francisco | San Jose | Santa Barbara | Santa Cruz |
    Santiago | Santo Domingo | Sarajevo | Savannah | Seattle | Seoul | Seville | Shanghai | Sheffield | Singapore |
    Sofia | Southampton | Stockholm | Stuttgart | Sydney | Taipei | Tampa | Tehran | Tokyo | Toledo | Toronto |
    Toulouse | Trieste | Tripoli | Tucson | Turin | Utrecht | Valencia | Vancouver | Venice | Verona | Vienna |
    Warsaw | Washington | Wellington | Winnipeg | Zagreb | Zurich
    """,
    separator=" | ",
)

ADJECTIVES = _list(
    """
    amber ancient angry autumn azure bitter black blue bold brass brave bright broken bronze brown calm careful
    cheerful clever cloudy cold copper coral crimson crooked curious dark deep distant dusty eager early eastern
    elegant emerald empty endless faded faithful famous fancy fearless fierce final foggy foreign fragile frozen
    gentle giant gilded glass gloomy golden graceful grand gray green happy hasty heavy hidden hollow honest humble
    hungry icy idle iron ivory jolly joyful keen kind late lazy lively lonely long loud loyal lucky marble mellow
    merry mighty misty modest mossy muddy narrow neat nervous noble noisy northern odd old olive orange pale patient
    plain playful polite proud purple quick quiet rapid rare red restless rich rough round royal rusty sandy scarlet
    secret shallow sharp shiny shy silent silver simple sleepy slow small smooth snowy soft solemn southern spotted
    square steady steep stern stormy strange strong sturdy subtle sunny sweet swift tall tame tender thirsty tidy
    tiny tired twisted upper velvet violet warm weary western white wicked wide wild windy winter wise wooden yellow
    young
    """
)

NOUNS = _list(
    """
    acorn anchor apple apron arrow badger banner barley barrel basin basket beacon beaver bell bench berry bishop
    blanket bottle boulder branch bridge broom bucket butter button cabin cable camel candle canyon carpet castle
    cathedral cavern cedar cherry chimney cliff clock cloud clover coach comet compass cottage cradle crane creek
    crown crystal curtain cushion dagger daisy desert dolphin donkey door dragon drum eagle ember falcon feather
    fence ferry fiddle field flute forest fountain fox garden garlic gate goblet goose grape hammer harbor harp
    harvest hawk hazel hedge helmet heron hill honey horse island ivy jacket jewel kettle key kitchen kite ladder
    lake lamp lantern laurel leaf lemon leopard library lily lion lizard lobster locket magnet maple market meadow
    mill mirror monkey moon mountain mustard needle nest oak ocean onion orchard otter owl paddle palace panther
    parrot path peacock pearl pebble pepper piano pigeon pillow pine planet plum pocket pond poppy potato prairie
    prince puzzle quill rabbit raven reef ribbon river robin rocket rope rose saddle sailor salmon scarf school
    shadow sheep shell ship shovel spear spider spoon spring squirrel stable star statue stone stove stream sunset
    swallow swan table tailor temple thistle throne thunder tiger timber torch tower trumpet tulip tunnel turkey
    turtle valley violin wagon walnut walrus water weaver wheat wheel whistle willow window wolf wren zebra
    """
)

FIRST_NAMES = _list(
    """
    Abigail Adam Agnes Albert Alice Amelia Andrew Anna Arthur Beatrice Benjamin Caroline Catherine Cecil Charles
    Clara Daniel Dorothy Edgar Edith Edmund Edward Eleanor Emily Ernest Esther Eugene Felix Florence Francis
    Frederick George Gilbert Grace Harold Harriet Helen Henry Herbert Hugh Isaac Isabel Jacob James Joseph Julia
    Laura Leonard Lewis Louisa Lucy Margaret Martha Martin Matilda Maurice Miriam Nathan Nicholas Oliver Oscar
    Patrick Philip Rachel Ralph Rebecca Richard Robert Rupert Ruth Samuel Sarah Simon Stephen Susan Theodore Thomas
    Victor Vincent Walter William
    """
)

LAST_NAMES = _list(
    """
    Abbott Adler Ainsworth Ashford Atkinson Bailey Barker Barlow Bennett Bishop Blackwood Bradley Bramwell Brewster
    Briggs Burton Calloway Carlisle Carver Chandler Clayton Collins Cooper Crawford Dalton Davenport Dawson Dixon
    Draper Dunbar Ellison Emerson Fairfax Farrow Fletcher Forester Foster Gardner Garrison Gibson Goodwin Graham
    Grayson Hadley Hale Harding Hartley Hawkins Hayward Holland Hopkins Hudson Ingram Jarvis Jenkins Keating Kendall
    Lambert Langley Lawson Lockwood Marlow Marsh Mason Mercer Merritt Milton Morton Nash Newton Norton Osborne
    Palmer Parker Payne Pearson Perkins Porter Prescott Quincy Radcliffe Ramsey Redmond Rhodes Ridley Rowland Sawyer
    Selby Sharpe Sheldon Sherwood Slater Spencer Stanton Sterling Sutton Talbot Thornton Tilton Turner Underwood
    Vaughan Wakefield Walton Warner Webster Whitaker Wilcox Winslow Woodward
    """
)
