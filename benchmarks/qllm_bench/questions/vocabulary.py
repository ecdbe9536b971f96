"""Words that the members of kinds are made of."""

# Word lists read better as words than as lists of strings.
# ruff: noqa: SIM905, E501

from __future__ import annotations

TITLES = (
    "Captain;Dr.;Mr.;Mrs.;Miss;Old;Young;Sister;Brother;Father;Uncle;Aunt;Inspector;Lady;Lord;Sir;Professor;Count;Colonel;"
    "Judge;Major;Sergeant;the widow;Madame;Deacon;Nurse;Master;Cousin;Dame;Squire;Bishop;Agent;Lieutenant"
).split(";")
PEOPLE = (
    "archivist porter bursar curator steward keeper warden dean beadle cook gardener groom clerk sexton abbot widow "
    "night-watchman harbour-master housekeeper registrar treasurer landlord lamplighter coachman quartermaster caretaker "
    "foreman verger magistrate bailiff secretary conductor ferryman inspector lodger apprentice colonel governess nurse "
    "pilot cashier librarian miller tanner cooper saddler blacksmith"
).split()
SIMPLE_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cr dr gr pr th tr sh st".split()
SIMPLE_VOWELS = "a e i o u a e i o".split()
SIMPLE_ENDS = "n r l s t d m ck ll nd rt mond well ick ett in er as on ard ling ley".split()
NAME_ENDS = "ton by ley ford wick man field wood worth son er mere bridge combe stone gate smith ham bury ridge".split()
TOWN_FIRST = "Port Lake Saint North South Upper Lower Stoke New Castle Great Little Fort Market Long".split()
TOWN_LAST = "Bay End Cross Green Hill Row Lane Street Abbey Ferrers Heath Moor Sound Point Wells Regis Magna".split()
BUILDINGS = (
    "almshouse;schoolhouse;boathouse;icehouse;chapel;armoury;bakery;granary;brewery;museum;library;observatory;workshop;"
    "warehouse;pumping station;depot;stables;garage;laundry;town hall;lighthouse;windmill;theatre;hospital;hotel;inn;"
    "vicarage;orangery;tannery;customs house;signal box;power station;abbey;prison;market hall;guardhouse;priory;mint;"
    "foundry;gallery;post office;barracks;summer house;bath house;clock tower"
).split(";")
ROOMS = (
    "gallery;cellar;attic;study;pantry;library;vault;crypt;boiler room;map room;ballroom;laboratory;server room;kitchen;"
    "scullery;nursery;hall;chart room;reading room;strongroom;cloakroom;dining room;loft;corridor;drawing room;wine cellar"
).split(";")
LETTERED = "cabinet;Gate;Ward;room;locker;platform;bay;hall;shelf;cell;office;dock".split(";")
OBJECTS = (
    "dagger;notebook;lantern;harp;chalice;ledger;clock;compass;telescope;carpet;crown;mirror;locket;casket;tapestry;trunk;"
    "umbrella;bell;sword;statue;vase;map;flag;wardrobe;key;chair;globe;desk;barometer;violin;candlestick;snuffbox;coat;"
    "saddle;trophy;teapot;painting;cradle;bracelet;helmet;ring;lamp;ladder;piano;bicycle;suitcase;scarf;goblet;shield"
).split(";")
MACHINES = (
    "engine;pump;compressor;condenser;rotor;turbine;generator;loom;press;relay;transmitter;locomotive;tractor;boiler;"
    "reactor;furnace;server;router;printer;valve;crane;elevator;sensor;gearbox;dynamo;telegraph;winch;drill;conveyor"
).split(";")
UNITS = "module;controller;unit;server;engine;pump;node;model;station;sensor".split(";")
SOCIETIES = (
    "Cartographic Society;Botanical Society;Shipping Company;Trading Company;Bank;Brewery;Institute;Academy;Foundation;"
    "Railway;Insurance Company;Press;Mining Company;Works;Publishing House;Laboratories;Museum;Choir;College;Trust"
).split(";")
LANDMARKS = "bridge;viaduct;tunnel;canal;waterfall;lighthouse;dam;pass;forest;mine;quarry;pier;causeway;glacier;reservoir".split(
    ";"
)
EVENTS = (
    "fair;siege;regatta;congress;exhibition;festival;auction;election;trial;parade;race;conference;tournament;ball;flood;"
    "fire;strike;concert;picnic;expedition"
).split(";")
PAPERS = (
    "agreement;contract;treaty;lease;charter;will;petition;manuscript;memorandum;report;inventory;decree;bill;register;"
    "chronicle;statute;warrant;prospectus;catalogue;diary"
).split(";")
PRIZES = "Prize Medal Cup Award Trophy Scholarship Shield".split()
TEAMS = "Rovers Wanderers United Harriers Swifts Lions Rangers Athletic Oarsmen Falcons".split()
ANIMALS = (
    "heron mare otter badger warbler lizard beetle trout goat mule parrot falcon terrier hound pike swallow moth hare stoat "
    "crane salmon raven gull squirrel lynx tortoise viper finch bear wolf donkey ox ferret crab newt plover kestrel"
).split()
COLOURS = (
    "red blue green yellow purple orange brown black white grey pink crimson scarlet vermilion maroon ivory teal lilac indigo "
    "turquoise violet amber ochre charcoal emerald silver golden olive navy cream russet magenta beige copper"
).split()
SHADES = "pale dark dapple bright dull deep light dusty sea smoke".split()
METALS = "iron bronze copper silver gold tin lead zinc brass steel nickel pewter platinum cobalt titanium".split()
MATERIALS = (
    "walrus ivory;bog oak;slate;marble;granite;sandstone;leather;cork;velvet;silk;linen;wool;clay;porcelain;glass;bamboo;"
    "cedar;walnut;birch bark;horn;bone;felt;wicker;amber;jade;canvas;cherry wood;limestone;red brick;flint;straw"
).split(";")
FOODS = (
    "pickled quince;roast marrow;smoked eel;barley soup;oat cakes;plum pudding;cheese;onion tart;rye bread;herring;honey cake;"
    "boiled mutton;mushroom pie;turnips;baked apples;lentils;chestnuts;trout;dumplings;gingerbread;beetroot;cabbage;walnuts;"
    "roast goose;figs;porridge;oysters;radishes;apricots;rice pudding"
).split(";")
DRINKS = "ginger wine;cider;black tea;buttermilk;elderflower cordial;coffee;ale;plum brandy;barley water;hot milk;mead;rum;lemonade;sherry;cocoa".split(
    ";"
)
FUELS = "whale oil;peat gas;coal;paraffin;diesel;charcoal;hydrogen;wood pellets;steam;turpentine;naphtha;kerosene;coke;lamp oil".split(
    ";"
)
TRADES = (
    "clockmaker;chimney sweep;farrier;notary;glassblower;laundress;cartographer;ropemaker;beekeeper;night dispatcher;treasurer;"
    "locksmith;apothecary;milliner;gravedigger;bookbinder;geologist;street porter;organ tuner;shipwright;tax collector;"
    "music teacher;stonemason;dressmaker;bell founder;customs officer;piano tuner;veterinary surgeon;wine merchant;train driver;"
    "baker;carpenter;nurse;teacher;lawyer;surveyor;potter;weaver;fisherman;schoolmaster;typesetter;botanist;lamplighter;pilot"
).split(";")
LANGUAGES = (
    "Basque Maltese Frisian Catalan Welsh Greek Danish Turkish Persian Hebrew Polish Finnish Gaelic Latin Arabic Hindi Swahili "
    "Breton Russian Portuguese Icelandic Flemish Hungarian Armenian Spanish Norwegian"
).split()
INSTRUMENTS = "fiddle flute harp oboe cello trumpet organ lute bassoon drum piano clarinet viola accordion horn mandolin bagpipes zither".split()
PLANTS = (
    "marigold tamarind juniper heather gorse lavender barley rye foxglove thyme nettle willow fern sage poppy clover hemlock "
    "rosemary ivy hawthorn cardamom saffron angelica comfrey elderflower mint parsley wormwood yarrow chamomile"
).split()
ILLNESSES = "scarlet fever;gout;measles;whooping cough;pneumonia;malaria;a broken ankle;bronchitis;mumps;typhus;asthma;cholera;jaundice;influenza;toothache".split(
    ";"
)
SPORTS = (
    "rowing fencing cricket archery wrestling skating tennis croquet swimming boxing chess bowls curling polo".split()
)
SUBJECTS = (
    "geometry;botany;law;astronomy;theology;chemistry;medicine;rhetoric;history;algebra;navigation;philosophy;geology;anatomy;"
    "music;mechanics;economics;optics;logic;architecture"
).split(";")
CARGOES = (
    "salt;timber;winter barley;tea;copper ore;wool;tobacco;cotton;coal;sugar;cocoa;rice;wine;saffron;rubber;slate;hemp;grain;"
    "pepper;coffee;marble;olive oil;indigo;flax;cement;potash;whisky;silk;herring;lamp oil"
).split(";")
VERBS = "feed paint count visit watch climb mend collect carry wash draw polish follow photograph wind light measure bury catch sketch".split()
VERBS_BY_PLACE = "eat a sandwich;drink tea;sit on a bench;fly a kite;swim;listen to the band;read;dance;row a boat;take a nap;play cards".split(
    ";"
)
RELATIVES = (
    "sister brother aunt uncle grandfather grandmother niece nephew cousin daughter son stepmother godfather".split()
)
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
DIRECTIONS = "north south east west north-west north-east south-west south-east".split()
HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
ORDINALS = "first second third fourth fifth sixth seventh ninth tenth twelfth".split()
SIDES = "eastern western northern southern upper lower primary secondary inner outer main old new left right".split()
GREEK = "Alpha Beta Gamma Delta Lambda Sigma Omega Kappa Zeta Theta".split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
