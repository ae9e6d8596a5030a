"""The English words that the demo's language has words for: 240 nouns and 240 verbs, none in both lists."""

_NOUNS = """
owl river stone boat lamp kettle apple bread horse sheep goat wolf bear fox deer hare mouse cat dog cow pig hen duck
goose swan crow robin eagle hawk snake frog toad newt trout salmon eel crab whale seal shark bee wasp ant moth spider
snail worm tree oak pine birch willow apricot pear plum cherry grape fig lemon olive onion carrot turnip cabbage pea
lentil corn wheat barley oat rye flour butter cheese honey salt pepper sugar egg soup pie cake jam wine beer cider cup
bowl plate spoon fork knife pot pan jug bottle barrel basket box chest bag sack purse coin ring crown sword spear
arrow shield helmet drum flute harp violin bell clock mirror candle torch oven chimney roof wall door window floor
stair cellar attic kitchen table chair bench cradle blanket pillow carpet curtain broom bucket ladder rope chain
hammer saw axe plough rake spade shovel wheel cart sledge bridge road path gate fence hedge field meadow garden
orchard forest hill valley mountain cave island shore beach wave lake pond spring swamp desert cloud storm wind
thunder frost moon sun star planet shirt coat cloak hat cap scarf glove belt boot shoe sock button needle thread wool
cotton silk leather letter book page pen ink pencil map flag statue tower castle temple market mill farm barn stable
tent hut harbour sail anchor oar net baker miller doctor teacher farmer sailor king queen prince child uncle
"""

_VERBS = """
see hear smell taste touch hold carry lift drop throw catch push pull drag bring take give lend borrow steal hide find
lose seek keep leave reach follow lead chase hunt fight defend attack protect rescue save free bind tie fasten loosen
open close lock unlock break mend repair build destroy burn freeze melt boil fry roast peel slice grind mix stir pour
fill empty wash scrub rinse dry wipe sweep polish paint draw carve engrave write read copy erase print sing praise
blame accuse forgive punish reward thank greet welcome invite visit meet avoid forget remember know believe doubt
trust fear love hate like admire envy pity mock tease annoy please comfort calm frighten warn advise teach learn study
explain describe mention name call ask answer tell promise refuse accept reject choose prefer want need demand offer
sell buy trade pay owe own share divide gather collect count measure weigh compare sort arrange order stack bury dig
plant sow reap harvest pick chop split fell sharpen bend fold roll wrap cover uncover spread scatter shake strike hit
kick slap pinch squeeze press crush tear rip sew knit weave spin dye wear remove replace exchange move turn raise
lower hang climb cross enter pass guard watch observe notice spot ignore examine test try begin finish continue stop
delay prevent allow forbid command obey serve help hinder feed starve eat drink swallow chew bite lick kiss hug
embrace marry adopt bless
"""

NOUNS, VERBS = _NOUNS.split(), _VERBS.split()
