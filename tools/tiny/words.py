"""The lexicon of `tiny`: nouns with category and Korean, opposites, verbs, and a few facts.

Tables are compact text, one group per line, for people to read and correct; they are parsed once at import.
No Korean noun translates two English ones, so every translation has a single correct answer.
"""

from typing import NamedTuple


class Noun(NamedTuple):
    """An English noun, its Korean word, and the name of its category (English)."""

    word: str
    korean: str
    category: str


def _parse_words(text: str) -> list[str]:
    """Parse `a, b, c` over several lines."""
    return [cell.strip() for cell in text.replace("\n", ",").split(",") if cell.strip()]


def _parse_pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse `a/b, c/d` as pairs."""
    cells = (cell.split("/") for cell in _parse_words(text))
    return tuple((first, second) for first, second in cells)


CATEGORY_KOREAN = {
    "animal": "동물",
    "fruit": "과일",
    "vegetable": "채소",
    "garment": "옷",
    "vehicle": "탈것",
    "body part": "신체",
    "tool": "도구",
    "food": "음식",
    "furniture": "가구",
    "instrument": "악기",
    "person": "사람",
    "place": "장소",
    "color": "색",
    "drink": "음료",
}

_NOUNS = {
    "animal": """
        cat/고양이, dog/개, cow/소, horse/말, sheep/양, pig/돼지, duck/오리, frog/개구리, lion/사자,
        bee/벌, snake/뱀, mouse/쥐, owl/부엉이, crow/까마귀, goat/염소, deer/사슴, goose/거위, bear/곰,
        tiger/호랑이, rabbit/토끼, fox/여우, wolf/늑대, monkey/원숭이, elephant/코끼리, whale/고래,
        ant/개미, spider/거미, turtle/거북이, camel/낙타, eagle/독수리, swan/백조, donkey/당나귀,
        giraffe/기린, kangaroo/캥거루, butterfly/나비, dolphin/돌고래, penguin/펭귄, chick/병아리,
        rooster/수탉""",
    "fruit": """
        apple/사과, banana/바나나, grape/포도, lemon/레몬, peach/복숭아, melon/멜론, strawberry/딸기,
        cherry/체리, plum/자두, persimmon/감, mango/망고, watermelon/수박""",
    "vegetable": """
        carrot/당근, onion/양파, potato/감자, tomato/토마토, cucumber/오이, cabbage/배추, pumpkin/호박,
        radish/무, spinach/시금치, eggplant/가지, garlic/마늘, mushroom/버섯""",
    "garment": """
        hat/모자, shirt/셔츠, skirt/치마, sock/양말, shoe/신발, coat/외투, glove/장갑, scarf/목도리,
        dress/원피스, belt/허리띠, sweater/스웨터, vest/조끼""",
    "vehicle": """
        car/자동차, bus/버스, train/기차, bicycle/자전거, truck/트럭, taxi/택시, ship/배,
        airplane/비행기, subway/지하철, helicopter/헬리콥터, rocket/로켓, ambulance/구급차""",
    "body part": """
        hand/손, foot/발, eye/눈, ear/귀, nose/코, mouth/입, tooth/이빨, neck/목, knee/무릎,
        shoulder/어깨, finger/손가락, head/머리""",
    "tool": """
        hammer/망치, saw/톱, knife/칼, needle/바늘, scissors/가위, shovel/삽, ladder/사다리,
        broom/빗자루, rope/밧줄, axe/도끼, screw/나사, key/열쇠""",
    "food": """
        bread/빵, rice/밥, soup/국, egg/달걀, cheese/치즈, noodle/국수, cookie/과자, candy/사탕,
        meat/고기, honey/꿀, salt/소금, sugar/설탕""",
    "furniture": """
        chair/의자, desk/책상, bed/침대, table/탁자, sofa/소파, shelf/선반, drawer/서랍, bench/벤치,
        wardrobe/옷장, bookcase/책장""",
    "instrument": """
        drum/북, piano/피아노, violin/바이올린, guitar/기타, flute/플루트, trumpet/트럼펫, harp/하프,
        cello/첼로, harmonica/하모니카, xylophone/실로폰""",
    "person": """
        teacher/선생님, doctor/의사, nurse/간호사, farmer/농부, baker/제빵사, singer/가수, painter/화가,
        soldier/군인, cook/요리사, student/학생, writer/작가, king/왕, queen/여왕, child/아이,
        friend/친구, mother/어머니, father/아버지, baby/아기, woman/여자, man/남자""",
    "place": """
        school/학교, hospital/병원, market/시장, park/공원, library/도서관, farm/농장, bank/은행,
        church/교회, station/역, museum/박물관, bakery/빵집, kitchen/부엌""",
    "color": """
        red/빨간색, yellow/노란색, green/초록색, blue/파란색, white/하얀색, black/검은색, brown/갈색,
        gray/회색, purple/보라색, pink/분홍색, orange/주황색""",
    "drink": """
        water/물, milk/우유, juice/주스, tea/차, coffee/커피, lemonade/레모네이드, cocoa/코코아,
        cola/콜라""",
}
_THINGS = """
    ball/공, book/책, kite/연, boat/보트, doll/인형, box/상자, cup/컵, umbrella/우산, bag/가방,
    coin/동전, ring/반지, flower/꽃, tree/나무, house/집, river/강, mountain/산, sea/바다, sky/하늘,
    sun/해, moon/달, star/별, rain/비, wind/바람, cloud/구름, stone/돌, leaf/잎, door/문, window/창문,
    clock/시계, letter/편지, picture/그림, song/노래, road/길, room/방, garden/정원, lamp/등불,
    mirror/거울, pencil/연필, candle/양초, bottle/병, basket/바구니, pillow/베개, blanket/이불,
    night/밤, morning/아침, winter/겨울, summer/여름, spring/봄, autumn/가을, name/이름, dream/꿈,
    money/돈, paper/종이, war/전쟁, peace/평화, love/사랑"""

NOUNS = tuple(Noun(en, ko, kind) for kind, text in _NOUNS.items() for en, ko in _parse_pairs(text))
OTHER_NOUNS = tuple(Noun(en, ko, "thing") for en, ko in _parse_pairs(_THINGS))
COLORS = {noun.word: noun.korean for noun in NOUNS if noun.category == "color"}

OPPOSITES = _parse_pairs("""
    big/small, hot/cold, fast/slow, old/young, tall/short, happy/sad, full/empty, heavy/light,
    hard/soft, wet/dry, clean/dirty, rich/poor, strong/weak, thick/thin, wide/narrow, deep/shallow,
    early/late, good/bad, near/far, new/ancient, loud/quiet, open/closed, right/wrong, true/false,
    sweet/bitter, bright/dark, easy/difficult, cheap/expensive, first/last, up/down, inside/outside,
    above/below, day/night, summer/winter, push/pull, buy/sell, start/finish, win/lose, laugh/cry,
    always/never, many/few, rough/smooth, brave/cowardly, safe/dangerous, kind/cruel, lazy/diligent,
    awake/asleep, alive/dead, sharp/blunt, arrive/leave, remember/forget, question/answer, friend/enemy""")

OPPOSITES_KOREAN = _parse_pairs("""
    크다/작다, 뜨겁다/차갑다, 빠르다/느리다, 높다/낮다, 길다/짧다, 무겁다/가볍다, 넓다/좁다, 많다/적다,
    밝다/어둡다, 강하다/약하다, 두껍다/얇다, 깊다/얕다, 가깝다/멀다, 깨끗하다/더럽다, 좋다/나쁘다,
    쉽다/어렵다, 비싸다/싸다, 기쁘다/슬프다, 열다/닫다, 사다/팔다, 이기다/지다, 웃다/울다, 앉다/서다,
    밀다/당기다, 오다/가다, 주다/받다, 묻다/대답하다, 시작하다/끝나다, 켜다/끄다, 입다/벗다, 위/아래,
    앞/뒤, 안/밖, 왼쪽/오른쪽, 낮/밤, 여름/겨울, 친구/적, 남자/여자, 부자/가난뱅이, 처음/마지막,
    같다/다르다, 있다/없다, 딱딱하다/부드럽다, 달다/쓰다, 올라가다/내려가다, 늘다/줄다, 살다/죽다,
    기억하다/잊다""")

VERBS = _parse_pairs("""
    go/went, eat/ate, see/saw, run/ran, sing/sang, swim/swam, write/wrote, drink/drank, give/gave,
    take/took, come/came, find/found, make/made, buy/bought, think/thought, bring/brought, catch/caught,
    teach/taught, sleep/slept, keep/kept, feel/felt, leave/left, lose/lost, build/built, send/sent,
    say/said, tell/told, sell/sold, sit/sat, stand/stood, win/won, know/knew, grow/grew, throw/threw,
    fly/flew, draw/drew, break/broke, speak/spoke, choose/chose, forget/forgot, drive/drove, ride/rode,
    rise/rose, fall/fell, hide/hid, meet/met, read/read, begin/began, ring/rang, wear/wore, hear/heard,
    hold/held, walk/walked, jump/jumped, play/played, talk/talked, help/helped, open/opened,
    close/closed, cook/cooked, wash/washed, clean/cleaned, dance/danced, laugh/laughed, smile/smiled,
    listen/listened, paint/painted, carry/carried, cry/cried, study/studied, try/tried, stop/stopped,
    plan/planned, hug/hugged""")

SOUNDS = _parse_pairs("""
    dog/woof, cat/meow, cow/moo, sheep/baa, duck/quack, pig/oink, frog/ribbit, lion/roar, bee/buzz,
    snake/hiss, mouse/squeak, owl/hoot, horse/neigh, crow/caw, chick/peep, donkey/hee-haw, goose/honk,
    wolf/howl, rooster/cock-a-doodle-doo""")
SOUNDS_KOREAN = _parse_pairs("""
    개/멍멍, 고양이/야옹, 소/음매, 양/매애, 오리/꽥꽥, 돼지/꿀꿀, 개구리/개굴개굴, 사자/어흥, 벌/윙윙,
    쥐/찍찍, 부엉이/부엉부엉, 까마귀/까악까악, 병아리/삐약삐약, 수탉/꼬끼오, 말/히힝, 뱀/쉭쉭,
    매미/맴맴, 귀뚜라미/귀뚤귀뚤, 늑대/아우우, 참새/짹짹""")
BABIES = _parse_pairs("""
    dog/puppy, cat/kitten, cow/calf, sheep/lamb, duck/duckling, pig/piglet, horse/foal, lion/cub,
    hen/chick, goat/kid, deer/fawn, goose/gosling, frog/tadpole, kangaroo/joey, swan/cygnet, owl/owlet,
    eagle/eaglet, butterfly/caterpillar""")

CAPITALS = tuple(
    (country, capital, country_ko, capital_ko)
    for (country, capital), (country_ko, capital_ko) in zip(
        _parse_pairs("""
            France/Paris, Korea/Seoul, Japan/Tokyo, China/Beijing, Italy/Rome, Spain/Madrid,
            Germany/Berlin, England/London, Russia/Moscow, Egypt/Cairo, Greece/Athens, Norway/Oslo,
            Sweden/Stockholm, Finland/Helsinki, Denmark/Copenhagen, Poland/Warsaw, Portugal/Lisbon,
            Austria/Vienna, Hungary/Budapest, Ireland/Dublin, Canada/Ottawa, Cuba/Havana, Peru/Lima,
            Chile/Santiago, Kenya/Nairobi, Thailand/Bangkok, Vietnam/Hanoi, Iran/Tehran, Iraq/Baghdad,
            Belgium/Brussels, Turkey/Ankara, Australia/Canberra, Nepal/Kathmandu, Indonesia/Jakarta"""),
        _parse_pairs("""
            프랑스/파리, 한국/서울, 일본/도쿄, 중국/베이징, 이탈리아/로마, 스페인/마드리드, 독일/베를린,
            영국/런던, 러시아/모스크바, 이집트/카이로, 그리스/아테네, 노르웨이/오슬로, 스웨덴/스톡홀름,
            핀란드/헬싱키, 덴마크/코펜하겐, 폴란드/바르샤바, 포르투갈/리스본, 오스트리아/빈,
            헝가리/부다페스트, 아일랜드/더블린, 캐나다/오타와, 쿠바/아바나, 페루/리마, 칠레/산티아고,
            케냐/나이로비, 태국/방콕, 베트남/하노이, 이란/테헤란, 이라크/바그다드, 벨기에/브뤼셀,
            터키/앙카라, 호주/캔버라, 네팔/카트만두, 인도네시아/자카르타"""),
        strict=True,
    )
)

# English thing:Korean thing, by color; the Korean color is the color's Korean word.
THING_COLORS = tuple(
    (*pair.split(":"), color)
    for color, text in {
        "red": "blood:피, tomato:토마토, strawberry:딸기, cherry:체리, fire truck:소방차",
        "yellow": "banana:바나나, lemon:레몬, chick:병아리, corn:옥수수, sunflower:해바라기",
        "green": "grass:잔디, frog:개구리, cucumber:오이, spinach:시금치, broccoli:브로콜리, leaf:잎",
        "blue": "sky:하늘, sea:바다, whale:고래",
        "white": "snow:눈, milk:우유, salt:소금, swan:백조, cotton:솜, rice:밥",
        "black": "coal:석탄, crow:까마귀, tire:타이어, ink:먹물",
        "brown": "chocolate:초콜릿, bear:곰, coffee:커피",
        "gray": "elephant:코끼리, mouse:쥐, ash:재, dolphin:돌고래",
        "purple": "eggplant:가지, grape:포도, violet:제비꽃",
        "pink": "pig:돼지, flamingo:홍학, peach:복숭아",
        "orange": "carrot:당근, pumpkin:호박, persimmon:감",
    }.items()
    for pair in text.split(", ")
)

IRREGULAR_PLURALS = dict(
    _parse_pairs("""
        mouse/mice, goose/geese, foot/feet, tooth/teeth, child/children, man/men, woman/women,
        sheep/sheep, deer/deer, knife/knives, wolf/wolves, leaf/leaves, shelf/shelves, scarf/scarves,
        potato/potatoes, tomato/tomatoes, mango/mangoes, radish/radishes""")
)
UNCOUNTABLE = frozenset(
    _parse_words("""
        bread, rice, soup, cheese, meat, honey, salt, sugar, water, milk, juice, tea, coffee, lemonade,
        cocoa, cola, garlic, spinach, scissors, rain, wind, money, paper, war, peace, love, furniture,
        sky, sea, sun, moon, winter, summer, spring, autumn""")
)
