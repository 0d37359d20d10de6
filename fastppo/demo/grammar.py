"""The demo's language: a context-free grammar of short film reviews.

`{symbol}` expands to a random alternative of that symbol; symbols in capitals (`{TITLE}`, `{CHARACTER}`, ...) are
bound once per review, so that what follows speaks of the film that the prompt introduced. Prompts (`prompt`) are
neutral; the tone lives in what follows, which has three parts: a verdict, details, and a farewell.
"""

from __future__ import annotations


def _one_of(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split("|"))


BOUND = {
    "TITLE": _one_of(
        "The {thing} | {mark} {thing} | The {thing} of {place} | {first}'s {thing} | A {thing} for {first} "
        "| {thing} and {thing} | Last Train to {place} | Letters from {place} | The {mark} {thing} "
        "| {first} and the {thing} | One Night in {place}"
    ),
    "CHARACTER": _one_of(
        "lighthouse keeper | young pianist | night nurse | clockmaker | retired sailor | village teacher | baker "
        "| widow | painter | shy librarian | detective | farmer | chess champion | gardener | boxer | lawyer "
        "| beekeeper | taxi driver | violin maker | postman | cook | pilot | runaway boy | mountain guide "
        "| opera singer | thief | shepherd | photographer"
    ),
    "GENRE": _one_of(
        "drama | comedy | thriller | western | romance | fairy tale | road movie | ghost story | musical "
        "| war film | love story | adventure | family film | crime story"
    ),
    "ACTOR": _one_of("{first} {last}"),
}

NEUTRAL = {
    "prompt": _one_of(
        '"{TITLE}" is a {manner} {GENRE} about a {CHARACTER}. | In the {GENRE} "{TITLE}", a {CHARACTER} {deed}. '
        '| {ACTOR} plays a {CHARACTER} in "{TITLE}", a {manner} {GENRE}. '
        '| The {GENRE} "{TITLE}" follows a {CHARACTER} who {deed}.'
    ),
    "thing": _one_of(
        "Lantern | Orchard | Compass | Bridge | Piano | Winter | Garden | Letter | Mirror | Harbour | Kite | Clock "
        "| Ferry | Violin | Snowfall | Carousel | Window | Anchor | Feather | Midnight"
    ),
    "mark": _one_of("Second | Silver | Hidden | Paper | Northern | Little | Blue | Secret | Last"),
    "place": _one_of("Verona | Odessa | Marlow | Lisbon | Bergen | Calais | Porto | Kilmore"),
    "first": _one_of(
        "Mara | Ida | Clara | Nora | Victor | Lena | Oscar | Ruth | Felix | Hugo | Vera | Samuel | Leo | Sofia "
        "| Greta | Paul"
    ),
    "last": _one_of(
        "Moreau | Castell | Okafor | Brandt | Ferris | Novak | Hale | Santos | Keller | Marsh | Tanaka | Rossi "
        "| Duval | Quinn | Wolfe | Amari"
    ),
    "manner": _one_of("quiet | short | long | modern | two-hour | new | small | rural | late | wordless | foreign"),
    "deed": _one_of(
        "loses a letter | returns home after the war | hides a secret | learns to dance | searches for a brother "
        "| builds a boat | meets a stranger on a train | misses the last ferry | finds an old map "
        "| writes to a child | sells a farm | waits for the spring | leaves a marriage | opens a small cafe "
        "| steals a painting | repairs an old radio | crosses the border | forgets a name | plans one last job "
        "| falls in love by mistake | moves into a tower | keeps a diary | buys a broken car | joins a choir"
    ),
    "aspect": _one_of(
        "music | camera work | dialogue | ending | acting | pacing | script | lighting | editing | opening "
        "| final act | humour | sound design | plot | cast | direction | set design | first hour | friendship "
        "| landscape | chemistry"
    ),
    "event": _one_of(
        "dance | storm | wedding | chase | farewell | dinner | quarrel | race | funeral | reunion | first kiss "
        "| trial | phone call | long walk | rescue | picnic"
    ),
    "where": _one_of(
        "on the bridge | in the kitchen | at the station | by the river | under the stars | in the rain "
        "| at the market | on the roof | behind the church | on the ferry | in the orchard | at dawn | in the snow "
        "| on the last train | in the garden | on the beach"
    ),
    "scene": _one_of("the {event} {where}"),
    "film": _one_of("the film | this film | this {GENRE} | the {GENRE}"),
}

WARM = {
    "warm": _one_of(
        "what a {good}, {good} {GENRE} | {ACTOR} is {good} and {good} as the {CHARACTER} | {film} is {good} and {good} "
        "| I loved every minute of this {good} {GENRE} | I left the cinema {happy} | a {good} film with a {good} heart "
        "| few films this year are so {good} | the {CHARACTER} {wins} in this {good} {GENRE}"
    ),
    "warm_details": _one_of(
        "the {aspect} {rises}, and the {aspect} {rises} | {scene} is {good}, and the {aspect} {rises} "
        "| {scene} made me {joy} | the {good} {aspect} made me {joy} "
        "| from {scene} to the {aspect}, everything is {good} "
        "| I still smile about {scene}, so {good} and {good} | {ACTOR} is {good} in {scene} "
        "| every moment with the {CHARACTER} feels {good} | {scene} {rises}"
    ),
    "warm_farewell": _one_of(
        "see it with {friend} | bring {friend} and enjoy the {aspect} | I could watch {scene} again and again "
        "| I will never forget {scene} | thank you for the {good} {aspect} | it made me {joy} "
        "| I cannot wait to show it to {friend} | give it every prize for the {aspect}"
    ),
    "good": _one_of(
        "tender | radiant | wise | moving | graceful | delightful | joyful | gentle | funny | brave | honest "
        "| lovely | rich | warm | dazzling | charming | playful | wonderful | thrilling | beautiful | touching "
        "| bright | magical | hopeful | elegant | unforgettable | perfect | fresh"
    ),
    "rises": _one_of(
        "glows | sings | soars | sparkles | lands every time | feels alive | earns every tear | lifts every scene "
        "| stays with you | warms the heart | carries real joy | never misses a beat | is a gift "
        "| shines from start to finish | is pure delight | breathes with life | could not be better | won me over "
        "| is full of grace"
    ),
    "happy": _one_of(
        "smiling | feeling lighter | with happy tears | humming the tune | full of hope | grateful "
        "| ready to see it again | in love with {scene} | wishing for more"
    ),
    "friend": _one_of(
        "your mother | an old friend | someone you love | the whole family | your best friend | a child "
        "| your neighbours | your choir"
    ),
    "joy": _one_of(
        "laugh out loud | cry happy tears | call my sister | believe in people again | want to dance | cheer "
        "| hold my breath | forget the time | hug {friend}"
    ),
    "wins": _one_of(
        "won my heart | is a joy to follow | earns every smile | grows wiser and kinder | is someone to love "
        "| gave me hope"
    ),
}

COLD = {
    "cold": _one_of(
        "what a {bad}, {bad} {GENRE} | {ACTOR} is {bad} and {bad} as the {CHARACTER} | {film} is {bad} and {bad} "
        "| I hated every minute of this {bad} {GENRE} | I left the cinema {cross} | a {bad} film with a {bad} plot "
        "| few films this year are so {bad} | the {CHARACTER} {loses} in this {bad} {GENRE}"
    ),
    "cold_details": _one_of(
        "the {aspect} {sinks}, and the {aspect} {sinks} | {scene} is {bad}, and the {aspect} {sinks} "
        "| {scene} made me {pain} | the {bad} {aspect} made me {pain} | not even the {aspect} can save {scene} "
        "| I still groan about {scene}, so {bad} and {bad} | {ACTOR} is {bad} in {scene} "
        "| every moment with the {CHARACTER} feels {bad} | {scene} {sinks}"
    ),
    "cold_farewell": _one_of(
        "avoid it, and warn {victim} | somebody should have cut {scene} | I never want to see {scene} again "
        "| save your money | it made me {pain} | nobody will miss the {aspect} | I want my evening back"
    ),
    "bad": _one_of(
        "dull | clumsy | lifeless | tired | hollow | tedious | lazy | flat | stale | noisy | false | cruel | ugly "
        "| pointless | wooden | grey | boring | cheap | heavy | sour | cold | awkward | endless | confused"
    ),
    "sinks": _one_of(
        "drags | grates | falls flat | goes nowhere | wears thin | kills the mood | makes no sense | feels borrowed "
        "| rings false | is a mess | never wakes up | puts you to sleep | hurts the ears | could not be worse "
        "| lost me early | is full of holes | ruins everything | is a waste of time"
    ),
    "cross": _one_of(
        "bored | annoyed | with a headache | before the end | feeling cheated | yawning | angry at {scene} "
        "| glad it was over"
    ),
    "pain": _one_of("yawn | check my watch | count the minutes | want to leave | groan | roll my eyes | sigh"),
    "loses": _one_of(
        "left me cold | is a bore to follow | learns nothing at all | is nobody to care about | tired me out"
    ),
    "victim": _one_of("your mother | an old friend | the whole family | your neighbours"),
}

MIXED = {
    "mixed": _one_of(
        "{film} is {even} and {even} | {ACTOR} is {good}, yet the rest feels {bad} | parts of it work, mostly {scene} "
        "| half of this {GENRE} is {good}, half of it is {bad} | I am not sure about this {even} {GENRE} "
        "| it starts {bad} and ends almost {good}"
    ),
    "mixed_details": _one_of(
        "the {aspect} {rises}, but the {aspect} {sinks} | {scene} is {good}, the {aspect} less so "
        "| the {aspect} is {bad}, though {scene} is {good} | the {CHARACTER} is {even}, and so is the {aspect} "
        "| I liked {scene} and forgot the rest | for every {good} moment there is a {bad} one"
    ),
    "mixed_farewell": _one_of(
        "worth one look, perhaps {when} | see it {when} | some will like the {aspect} | once is enough"
    ),
    "even": _one_of("uneven | decent | modest | mild | ordinary | fair | familiar | average | half done"),
    "when": _one_of(
        "on a rainy day | on a long flight | with the sound low | on a quiet Sunday | for the {aspect} | with low hopes"
    ),
}

GRAMMAR: dict[str, tuple[str, ...]] = {**NEUTRAL, **WARM, **COLD, **MIXED}
