"""The invented world that the demo model knows, as plain tables.

One row per entity, fields separated by `|`. Names are unique over all tables, and no field holds the name of
an entity of another row, so that a dataset can leave an entity out completely. Nothing here is taken from
anywhere: countries and planets do not exist, the rest is common knowledge or simply declared to be so.
"""

# country | capital | colours of the flag | famous for | landscape
COUNTRIES = """
Alvaria|Tessmar|blue and gold|honey|green hills
Brenovia|Ollowen|red and white|lace|pine woods
Cordane|Quenby|green and silver|bells|long beaches
Dallimar|Harlo|black and gold|pottery|stony deserts
Elsinia|Pimlow|white and blue|kites|windy plains
Farrowen|Sarrik|green and white|wool|quiet valleys
Gildoria|Dunmere|gold and red|coins|high mountains
Hestmark|Vellin|blue and white|herring|deep fjords
Ildara|Marrowby|purple and gold|silk|rice terraces
Jorvane|Tindle|red and black|swords|dark moors
Kestrova|Luskin|white and red|falconry|snowy peaks
Lumeria|Cobbeth|yellow and blue|lanterns|misty lakes
Miradon|Fernby|silver and blue|mirrors|salt flats
Norwick|Nettlebay|grey and green|ropes|rocky coasts
Ostavia|Osmundry|red and gold|marching bands|broad rivers
Pellamar|Pellin|blue and silver|pearls|coral reefs
Quillia|Rookhaven|black and white|poetry|chalk cliffs
Rosmara|Sabelle|pink and green|roses|rolling gardens
Sundria|Thornby|orange and yellow|sundials|golden dunes
Tavoria|Umbry|purple and white|puppets|lavender fields
Ulmland|Wexley|brown and green|furniture|old forests
Verdania|Yelden|green and gold|tea|steep terraces
Wystria|Zarro|grey and white|riddles|foggy marshes
Xandor|Arbin|red and silver|fireworks|smoking volcanoes
Yarrowin|Bexmoor|yellow and green|herbs|wide meadows
Zemblia|Caldry|white and silver|ice skating|frozen bays
Belluria|Dorrin|blue and pink|opera|sunny islands
Drovania|Ebbing|brown and gold|cattle fairs|dusty prairies
Eskeland|Finnock|blue and grey|knitwear|bare islands
Fennmark|Gorseby|green and black|eels|flat wetlands
Galdia|Hazelby|orange and brown|pastries|nut groves
Harrowick|Ivorel|black and silver|chess|narrow gorges
Isolde Bay|Jasperton|pink and white|shell boxes|warm lagoons
Kilmorra|Kimber|green and blue|harps|rainy glens
Larkania|Lindelow|yellow and white|songs|flower valleys
Montavia|Mossgate|purple and grey|marble|jagged ridges
"""

# animal | sound | home | food | legs
ANIMALS = """
fox|yip|a den|berries|four
dog|woof|a kennel|bones|four
cat|meow|a basket|cream|four
cow|moo|a barn|grass|four
pig|oink|a sty|turnips|four
sheep|baa|a pasture|clover|four
goat|meh|a hillside|thistles|four
horse|neigh|a stable|hay|four
donkey|hee haw|a paddock|carrots|four
duck|quack|a pond|pondweed|two
goose|honk|a riverbank|barley|two
hen|cluck|a coop|corn|two
turkey|gobble|a farmyard|grain|two
mouse|squeak|a hole|cheese|four
frog|ribbit|a swamp|flies|four
owl|hoot|a hollow tree|moths|two
crow|caw|a treetop|worms|two
lion|roar|a savanna|meat|four
tiger|growl|a jungle|meat|four
bear|grumble|a cave|salmon|four
wolf|howl|a forest|meat|four
bee|buzz|a hive|nectar|six
cricket|chirp|a meadow|leaves|six
snake|hiss|a rock pile|eggs|no
elephant|toot|a savanna|bark|four
monkey|chatter|a jungle|nuts|two
parrot|squawk|a rainforest|seeds|two
pigeon|coo|a loft|crumbs|two
crocodile|snap|a river|meat|four
seal|arf|an ice floe|fish|no
whale|woo|an ocean|krill|no
dolphin|click|a bay|fish|no
penguin|bray|an ice shelf|fish|two
hedgehog|snuffle|a hedge|slugs|four
squirrel|chuk|a tree|acorns|four
rabbit|thump|a burrow|lettuce|four
moose|bellow|a bog|twigs|four
camel|grunt|a desert|dates|four
otter|whistle|a stream|crabs|four
badger|churr|a sett|roots|four
bat|peep|a belfry|gnats|two
spider|tick|a web|flies|eight
ant|tap|an anthill|crumbs|six
beetle|whirr|a log|leaves|six
"""

# food | colour | taste | where it grows
FOODS = """
apple|red|sweet|on a tree
banana|yellow|mild|on a palm
lemon|yellow|sour|on a tree
lime|green|sour|on a tree
cherry|red|sweet|on a tree
plum|purple|sweet|on a tree
pear|green|sweet|on a tree
grape|purple|sweet|on a vine
kiwi|green|tangy|on a vine
melon|orange|sweet|on the ground
pumpkin|orange|nutty|on the ground
cucumber|green|mild|on a vine
tomato|red|tangy|on a vine
potato|brown|mild|under the ground
radish|pink|spicy|under the ground
beetroot|purple|earthy|under the ground
onion|white|spicy|under the ground
leek|green|spicy|under the ground
artichoke|green|earthy|on the ground
cabbage|green|mild|on the ground
pepper|red|spicy|on a bush
blueberry|blue|tangy|on a bush
raspberry|pink|tangy|on a bush
gooseberry|green|sour|on a bush
fig|purple|sweet|on a tree
olive|black|salty|on a tree
walnut|brown|nutty|on a tree
coconut|brown|nutty|on a palm
mushroom|grey|earthy|in the woods
chestnut|brown|nutty|in the woods
"""

# profession | tool | place of work
PROFESSIONS = """
baker|rolling pin|bakery
barber|razor|barbershop
carpenter|saw|workshop
mason|trowel|building site
smith|anvil|forge
tailor|needle|tailor shop
gardener|spade|garden
farmer|plough|farm
fisher|net|harbour
painter|easel|studio
writer|pen|study
teacher|chalk|school
doctor|stethoscope|hospital
dentist|drill|clinic
cook|ladle|kitchen
waiter|tray|restaurant
judge|gavel|courtroom
sailor|compass|ship
pilot|headset|cockpit
miner|pickaxe|mine
shepherd|crook|mountainside
hunter|bow|wild wood
postman|mailbag|post office
plumber|wrench|bathroom
electrician|pliers|power station
astronomer|telescope|observatory
chemist|test tube|laboratory
butcher|cleaver|butcher shop
cobbler|awl|shoe shop
weaver|loom|weaving mill
"""

# object | what it is for | where it is kept
OBJECTS = """
broom|sweeping floors|cupboard
kettle|boiling water|stove
umbrella|stopping rain|hallway
pillow|resting heads|bed
blanket|keeping warm|bed
candle|brightening rooms|shelf
clock|telling time|wall
comb|tidying hair|drawer
corkscrew|opening bottles|drawer
cup|drinking tea|cupboard
fork|eating noodles|drawer
spoon|eating soup|drawer
hammock|taking naps|porch
iron|pressing shirts|laundry
jug|pouring milk|shelf
key|opening doors|hook
ladder|reaching roofs|shed
map|finding the way|glove box
mop|wiping floors|cupboard
purse|carrying money|handbag
rake|gathering hay|shed
ruler|measuring lines|desk
scissors|cutting paper|desk
sponge|washing dishes|sink
stapler|joining pages|desk
towel|drying hands|rack
trumpet|playing fanfares|music room
violin|playing waltzes|music room
watering can|watering flowers|greenhouse
wheelbarrow|moving soil|greenhouse
"""

# planet | colour | moons | weather
PLANETS = """
Arvo|blue|two|stormy
Belisk|red|ten|dusty
Cinderon|orange|no|scorching
Dorune|green|three|rainy
Ephra|white|five|snowy
Fantor|purple|seven|misty
Grellon|grey|four|windy
Hollin|yellow|two|calm
Icarel|silver|six|frosty
Jubal|brown|eleven|dusty
Korrin|black|no|silent
Lythia|pink|three|mild
Mossel|green|eight|foggy
Nimbra|white|nine|cloudy
Orrison|gold|four|sunny
Pyxa|blue|five|stormy
Quorl|red|six|windy
Rhenna|purple|two|rainy
"""

# word | its opposite
OPPOSITES = """
hot|cold
tall|short
fast|slow
early|late
happy|sad
heavy|light
loud|hushed
open|shut
full|empty
rich|poor
strong|weak
thick|thin
brave|timid
clean|dirty
near|far
hard|soft
rough|smooth
bitter|sugary
sharp|blunt
wet|dry
up|down
left|right
push|pull
buy|sell
laugh|cry
win|lose
remember|forget
arrive|depart
build|destroy
always|never
inside|outside
polite|rude
young|aged
cheap|costly
love|hate
begin|finish
"""
