"""Secure aggregation: the server learns the sum of integer vectors modulo 2^bits, and nothing else of them.

Adversary: the server, which may cheat in any way, with a coalition of at most the policy's share of the PKI file's
members, chosen before the set-up. Trusted: the PKI file that each device pins, and the randomness of honest devices.

Guarantees, but for 2^-40 a set-up and what breaks the primitives: of a round, the view of such an adversary depends on
the honest members' vectors only by one sum, that of at least `Parameters.min_honest` of them. A sum is not private by
itself (arXiv:2403.17775): noise for differential privacy goes into the vectors, and may count on `min_honest` shares.

The argument, which docs/secagg.md gives with the message and the line that refuses each cheat:

1. *Identities.* Keys of a session come signed by identities of the PKI file; who is in it cannot be invented.
2. *Graph.* It follows from randomness that everybody committed to before anybody showed it. Corrupt members are fixed
   before it is known, so that nobody has `threshold` corrupt neighbours.
3. *Views.* A mask's key hangs on (session, round, model, sum, active members). Masks of members with different views do
   not cancel; and an honest member signs a survivor list only if all its neighbours in it signed their vector under its
   own view.
4. *One list.* A member signs one survivor list a round, and 2 · quorum > clients + corrupt, so that one list at most
   has a quorum. After that, of each neighbour a member gives the seed's share or the key's, by that list: never both.
   A member outside the list keeps its seed, one inside keeps its key, since the coalition alone has too few shares.
5. *Groups.* So masks of two honest survivors who are neighbours stay secret, and only sums of whole connected groups of
   honest survivors may show. Whoever is named as dropped out, knowing the graph: there is one group that shows, with
   all but a few (`fedinfer/secagg/graph.py: sparsest`).
6. *Rounds.* Each round has fresh keys and seeds. What recovers a dropout is of this round alone; no key that lasts is
   ever shared. Keys of boxes move on, so that a device seized later opens nothing of an earlier round.

Reference: Bonawitz et al. 2017, doi:10.1145/3133956.3133982; Bell et al. 2020, doi:10.1145/3372297.3417885.
"""

from fedinfer.secagg.coordinator import Coordinator
from fedinfer.secagg.identities import Identity, PkiFile
from fedinfer.secagg.masks import SumSpec, Words
from fedinfer.secagg.newcomer import Newcomer
from fedinfer.secagg.parameters import Parameters, Policy
from fedinfer.secagg.participant import Participant
from fedinfer.secagg.session import Session, agree, check_roster

__all__ = [
    "Coordinator",
    "Identity",
    "Newcomer",
    "Parameters",
    "Participant",
    "PkiFile",
    "Policy",
    "Session",
    "SumSpec",
    "Words",
    "agree",
    "check_roster",
]
