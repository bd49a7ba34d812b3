"""Short English words that drawn scenes show; the words of `scenes.is_held_out` stay untrained."""

from __future__ import annotations

WORDS = tuple(
    """
    able acid actor afraid after again agent air album alive angel anger angle animal answer
    apple april arch area arm army arrow artist ask atom aunt autumn award baby back badge bag
    baker ball bamboo banana band bank bark barn base basket bath beach bead beak bean bear
    beast bed bee bell belt bench berry bike bird bishop bite blade blanket blaze block bloom
    blow boat body bold bolt bone book boot border bottle bowl box boy brain branch brass brave
    bread break brick bridge brief bright broom brother brush bucket build bulb bull bus bush
    butter button cabin cable cactus cake calm camel camera camp candle canoe canyon cap car
    card carpet carrot cart castle cat cave cell chain chair chalk charm chart cheese chef cherry
    chess chest child chin city clay clean clerk cliff clock cloth cloud clown club coach coal
    coast coat coffee coin cold comb comet cook copper coral corn cotton cousin cow crab craft
    crane cream creek crew crop cross crow crown cube cup curtain dance danger dark dawn day
    deal deer desert desk dew dial diary dinner dirt dish diver doctor dog doll dolphin donkey
    door dove draft dragon dream dress drift drum duck dust eagle ear earth east echo edge egg
    elbow elder empty engine enter escape event eye fabric face fact falcon fall family farm
    fast father fear feast feather fence fern ferry fever field fig film fire fish fist flag
    flame flash fleet flight flood floor flour flower flute fog fold food foot forest fork
    fossil fox frame fresh friend frog frost fruit fuel game garage garden garlic gas gate gem
    ghost giant gift ginger girl glass glove goat gold goose grain grape grass gravel green
    grid guard guest guide guitar hair hall hammer hand happy harbor harp hat hawk heart heat
    helmet help hen herb hero hill hinge hockey hole honey hook horn horse host hotel hour
    house hunt ice idea ink insect iron island ivory jacket jar jazz jelly jewel joke judge
    juice jump jungle jury kettle key kid king kiss kitchen kite knee knife knight lab ladder
    lady lake lamb lamp land laser laugh law lawn leaf leather lemon letter level lid light
    lily lime line lion lip list lizard loaf lobby lock log lunch lung magic magnet mail mango
    map maple marble march market mask maze meadow medal melon menu metal milk mill mind mine
    mint mirror mist model money monkey moon morning moss moth motor mouse mouth movie mud
    museum music nail name neck needle nest net night noise north nose note novel nurse nut oak
    oasis ocean office oil olive onion open orbit orchid order otter oven owl owner oyster page
    paint palace palm panda paper park parrot party path peace peach pear pearl pen pencil
    pepper piano picnic pig pilot pin pine pipe pirate pizza plane planet plant plate plum
    pocket poem pole pond pony pool potato powder prince prize pump puppy puzzle queen quest
    quiet rabbit radio raft rail rain ramp ranch raven razor recipe reef rice ring river road
    robin robot rock rocket roof room root rope rose ruby rug ruler rust sad saddle sail salad
    salmon salt sand school sea season seat secret seed shade shark sheep shelf shell shield
    ship shirt shoe shop shore shovel shy silk silver singer sink sister skate ski skirt sky
    sleep slice slow smile smoke snail snake snow soap sock sofa soil song soup south space
    spark spice spider spoon spring stage stair stamp steam steel stem stone storm story straw
    street summer sun sugar swan sweet swim sword table tail tea team tent test thunder ticket
    tiger time toast tool tooth torch tower town toy trail train trap tree trick truck trumpet
    tulip tunnel turkey turtle uncle valley vase velvet violin voice wagon wall walnut wasp
    water wave wax west whale wheat wheel whisper wind window wine wing winter wolf wood wool
    yard year yeast zebra zero zoo
    """.split()  # noqa: SIM905 -- 654 quoted words would hide the list
)
