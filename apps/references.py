"""The papers that the methods come from, as BibTeX and as a line to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workbench.runtime import WorkbenchError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One source."""

    key: str
    kind: str
    """BibTeX's entry type."""
    fields: Mapping[str, str]

    def bibtex(self) -> str:
        """The entry."""
        lines = [f"  {name} = {{{value}}}," for name, value in self.fields.items()]
        return "\n".join([f"@{self.kind}{{{self.key},", *lines, "}"])

    def line(self) -> str:
        """Authors, year, title, place."""
        authors = [_given_first(name) for name in self.fields["author"].split(" and ")]
        shown = ", ".join(authors) if len(authors) <= 3 else f"{authors[0]} et al."
        place = next(
            (self.fields[name] for name in ("booktitle", "journal", "howpublished") if name in self.fields), ""
        )
        eprint = f" arXiv:{self.fields['eprint']}." if "eprint" in self.fields else ""
        return f"{shown} ({self.fields['year']}). {_plain(self.fields['title'])}. {_plain(place)}.{eprint}"


def _given_first(name: str) -> str:
    last, comma, first = _plain(name).partition(", ")
    return f"{first} {last}" if comma else last


def _plain(text: str) -> str:
    return text.replace("{", "").replace("}", "").replace("--", "–")


def _reference(key: str, kind: str, **fields: str) -> Reference:
    return Reference(key=key, kind=kind, fields=fields)


REFERENCES = {
    reference.key: reference
    for reference in (
        _reference(
            "wang2023interpretability",
            "inproceedings",
            author="Wang, Kevin and Variengien, Alexandre and Conmy, Arthur and Shlegeris, Buck and Steinhardt, Jacob",
            title="Interpretability in the Wild: a Circuit for Indirect Object Identification in {GPT-2} Small",
            year="2023",
            booktitle="International Conference on Learning Representations",
            eprint="2211.00593",
            archiveprefix="arXiv",
        ),
        _reference(
            "hanna2024have",
            "inproceedings",
            author="Hanna, Michael and Pezzelle, Sandro and Belinkov, Yonatan",
            title="Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms",
            year="2024",
            booktitle="Conference on Language Modeling",
            eprint="2403.17806",
            archiveprefix="arXiv",
        ),
        _reference(
            "syed2024attribution",
            "inproceedings",
            author="Syed, Aaquib and Rager, Can and Conmy, Arthur",
            title="Attribution Patching Outperforms Automated Circuit Discovery",
            year="2024",
            booktitle="Proceedings of the 7th {BlackboxNLP} Workshop: Analyzing and Interpreting Neural Networks for "
            "{NLP}",
            pages="407--416",
            eprint="2310.10348",
            archiveprefix="arXiv",
        ),
        _reference(
            "meloux2025mechanistic",
            "misc",
            author="Méloux, Maxime and Portet, François and Peyrard, Maxime",
            title="Mechanistic Interpretability as Statistical Estimation: A Variance Analysis of {EAP-IG}",
            year="2025",
            howpublished="arXiv preprint",
            eprint="2510.00845",
            archiveprefix="arXiv",
        ),
        _reference(
            "conmy2023towards",
            "inproceedings",
            author="Conmy, Arthur and Mavor-Parker, Augustine N. and Lynch, Aengus and Heimersheim, Stefan and "
            "Garriga-Alonso, Adrià",
            title="Towards Automated Circuit Discovery for Mechanistic Interpretability",
            year="2023",
            booktitle="Advances in Neural Information Processing Systems",
            eprint="2304.14997",
            archiveprefix="arXiv",
        ),
        _reference(
            "lindner2023tracr",
            "inproceedings",
            author="Lindner, David and Kramár, János and Farquhar, Sebastian and Rahtz, Matthew and "
            "McGrath, Thomas and Mikulik, Vladimir",
            title="{Tracr}: Compiled Transformers as a Laboratory for Interpretability",
            year="2023",
            booktitle="Advances in Neural Information Processing Systems",
            eprint="2301.05062",
            archiveprefix="arXiv",
        ),
        _reference(
            "gupta2024interpbench",
            "inproceedings",
            author="Gupta, Rohan and Arcuschin, Iván and Kwa, Thomas and Garriga-Alonso, Adrià",
            title="{InterpBench}: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability Techniques",
            year="2024",
            booktitle="Advances in Neural Information Processing Systems",
            eprint="2407.14494",
            archiveprefix="arXiv",
        ),
        _reference(
            "mueller2025mib",
            "inproceedings",
            author="Mueller, Aaron and Geiger, Atticus and Wiegreffe, Sarah and others",
            title="{MIB}: A Mechanistic Interpretability Benchmark",
            year="2025",
            booktitle="International Conference on Machine Learning",
            eprint="2504.13151",
            archiveprefix="arXiv",
        ),
        _reference(
            "power2022grokking",
            "misc",
            author="Power, Alethea and Burda, Yuri and Edwards, Harri and Babuschkin, Igor and Misra, Vedant",
            title="Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets",
            year="2022",
            howpublished="arXiv preprint",
            eprint="2201.02177",
            archiveprefix="arXiv",
        ),
        _reference(
            "nanda2023progress",
            "inproceedings",
            author="Nanda, Neel and Chan, Lawrence and Lieberum, Tom and Smith, Jess and Steinhardt, Jacob",
            title="Progress Measures for Grokking via Mechanistic Interpretability",
            booktitle="International Conference on Learning Representations",
            year="2023",
            eprint="2301.05217",
            archiveprefix="arXiv",
        ),
        _reference(
            "wang2024grokked",
            "misc",
            author="Wang, Boshi and Yue, Xiang and Su, Yu and Sun, Huan",
            title="Grokked Transformers are Implicit Reasoners: A Mechanistic Journey to the Edge of Generalization",
            year="2024",
            howpublished="arXiv preprint",
            eprint="2405.15071",
            archiveprefix="arXiv",
        ),
        _reference(
            "saparov2025transformers",
            "inproceedings",
            author="Saparov, Abulhair and Pawar, Srushti and Pimpalgaonkar, Shreyas and Joshi, Nitish and "
            "Pang, Richard Yuanzhe and Padmakumar, Vishakh and Kazemi, Seyed Mehran and Kim, Najoung and He, He",
            title="Transformers Struggle to Learn to Search",
            booktitle="International Conference on Learning Representations",
            year="2025",
            eprint="2412.04703",
            archiveprefix="arXiv",
        ),
        _reference(
            "friedman2023learning",
            "inproceedings",
            author="Friedman, Dan and Wettig, Alexander and Chen, Danqi",
            title="Learning Transformer Programs",
            booktitle="Advances in Neural Information Processing Systems",
            year="2023",
            eprint="2306.01128",
            archiveprefix="arXiv",
        ),
        _reference(
            "panigrahi2023skill",
            "inproceedings",
            author="Panigrahi, Abhishek and Saunshi, Nikunj and Zhao, Haoyu and Arora, Sanjeev",
            title="Task-Specific Skill Localization in Fine-tuned Language Models",
            year="2023",
            booktitle="International Conference on Machine Learning",
            eprint="2302.06600",
            archiveprefix="arXiv",
        ),
        _reference(
            "demoura2008z3",
            "inproceedings",
            author="de Moura, Leonardo and Bj{\\o}rner, Nikolaj",
            title="Z3: An Efficient SMT Solver",
            booktitle="Tools and Algorithms for the Construction and Analysis of Systems",
            year="2008",
            doi="10.1007/978-3-540-78800-3_24",
        ),
        _reference(
            "hewitt2019designing",
            "inproceedings",
            author="Hewitt, John and Liang, Percy",
            title="Designing and Interpreting Probes with Control Tasks",
            booktitle="Proceedings of the 2019 Conference on Empirical Methods in Natural Language Processing",
            year="2019",
            pages="2733--2743",
            eprint="1909.03368",
            archiveprefix="arXiv",
        ),
        _reference(
            "varma2023explaining",
            "misc",
            author="Varma, Vikrant and Shah, Rohin and Kenton, Zachary and Kramár, János and Kumar, Ramana",
            title="Explaining Grokking Through Circuit Efficiency",
            year="2023",
            howpublished="arXiv preprint",
            eprint="2309.02390",
            archiveprefix="arXiv",
        ),
        _reference(
            "press2023measuring",
            "inproceedings",
            author="Press, Ofir and Zhang, Muru and Min, Sewon and Schmidt, Ludwig and Smith, Noah A. and Lewis, Mike",
            title="Measuring and Narrowing the Compositionality Gap in Language Models",
            booktitle="Findings of the Association for Computational Linguistics: {EMNLP} 2023",
            year="2023",
            eprint="2210.03350",
            archiveprefix="arXiv",
        ),
        _reference(
            "dehghani2019universal",
            "inproceedings",
            author="Dehghani, Mostafa and Gouws, Stephan and Vinyals, Oriol and Uszkoreit, Jakob and Kaiser, Łukasz",
            title="Universal Transformers",
            booktitle="International Conference on Learning Representations",
            year="2019",
            eprint="1807.03819",
            archiveprefix="arXiv",
        ),
        _reference(
            "zhong2023clock",
            "inproceedings",
            author="Zhong, Ziqian and Liu, Ziming and Tegmark, Max and Andreas, Jacob",
            title="The {Clock} and the {Pizza}: Two Stories in Mechanistic Explanation of Neural Networks",
            booktitle="Advances in Neural Information Processing Systems",
            year="2023",
            eprint="2306.17844",
            archiveprefix="arXiv",
        ),
        _reference(
            "vig2020investigating",
            "inproceedings",
            author="Vig, Jesse and Gehrmann, Sebastian and Belinkov, Yonatan and Qian, Sharon and Nevo, Daniel "
            "and Singer, Yaron and Shieber, Stuart",
            title="Investigating Gender Bias in Language Models Using Causal Mediation Analysis",
            booktitle="Advances in Neural Information Processing Systems",
            year="2020",
        ),
        _reference(
            "meng2022locating",
            "inproceedings",
            author="Meng, Kevin and Bau, David and Andonian, Alex and Belinkov, Yonatan",
            title="Locating and Editing Factual Associations in {GPT}",
            booktitle="Advances in Neural Information Processing Systems",
            year="2022",
            eprint="2202.05262",
            archiveprefix="arXiv",
        ),
        _reference(
            "heimersheim2024how",
            "misc",
            author="Heimersheim, Stefan and Nanda, Neel",
            title="How to Use and Interpret Activation Patching",
            year="2024",
            howpublished="arXiv preprint",
            eprint="2404.15255",
            archiveprefix="arXiv",
        ),
        _reference(
            "nostalgebraist2020logit",
            "misc",
            author="{nostalgebraist}",
            title="Interpreting {GPT}: The Logit Lens",
            year="2020",
            howpublished="LessWrong",
        ),
        _reference(
            "belrose2023eliciting",
            "misc",
            author="Belrose, Nora and Ostrovsky, Igor and McKinney, Lev and Furman, Zach and Smith, Logan and "
            "Halawi, Danny and Biderman, Stella and Steinhardt, Jacob",
            title="Eliciting Latent Predictions from Transformers with the Tuned Lens",
            year="2023",
            howpublished="arXiv preprint",
            eprint="2303.08112",
            archiveprefix="arXiv",
        ),
        _reference(
            "alain2016understanding",
            "misc",
            author="Alain, Guillaume and Bengio, Yoshua",
            title="Understanding Intermediate Layers Using Linear Classifier Probes",
            year="2016",
            howpublished="arXiv preprint",
            eprint="1610.01644",
            archiveprefix="arXiv",
        ),
        _reference(
            "hewitt2019designing",
            "inproceedings",
            author="Hewitt, John and Liang, Percy",
            title="Designing and Interpreting Probes with Control Tasks",
            booktitle="Proceedings of the 2019 Conference on Empirical Methods in Natural Language Processing",
            year="2019",
            eprint="1909.03368",
            archiveprefix="arXiv",
        ),
        _reference(
            "voita2020information",
            "inproceedings",
            author="Voita, Elena and Titov, Ivan",
            title="Information-Theoretic Probing with Minimum Description Length",
            booktitle="Proceedings of the 2020 Conference on Empirical Methods in Natural Language Processing",
            year="2020",
            eprint="2003.12298",
            archiveprefix="arXiv",
        ),
        _reference(
            "elazar2021amnesic",
            "article",
            author="Elazar, Yanai and Ravfogel, Shauli and Jacovi, Alon and Goldberg, Yoav",
            title="Amnesic Probing: Behavioral Explanation with Amnesic Counterfactuals",
            journal="Transactions of the Association for Computational Linguistics",
            year="2021",
            volume="9",
            pages="160--175",
            eprint="2006.00995",
            archiveprefix="arXiv",
        ),
        _reference(
            "belrose2023leace",
            "inproceedings",
            author="Belrose, Nora and Schneider-Joseph, David and Ravfogel, Shauli and Cotterell, Ryan and "
            "Raff, Edward and Biderman, Stella",
            title="{LEACE}: Perfect Linear Concept Erasure in Closed Form",
            booktitle="Advances in Neural Information Processing Systems",
            year="2023",
            eprint="2306.03819",
            archiveprefix="arXiv",
        ),
        _reference(
            "elhage2021mathematical",
            "article",
            author="Elhage, Nelson and Nanda, Neel and Olsson, Catherine and Henighan, Tom and Joseph, Nicholas "
            "and Mann, Ben and Askell, Amanda and Bai, Yuntao and Chen, Anna and Conerly, Tom and DasSarma, Nova "
            "and Drain, Dawn and Ganguli, Deep and Hatfield-Dodds, Zac and Hernandez, Danny and Jones, Andy "
            "and Kernion, Jackson and Lovitt, Liane and Ndousse, Kamal and Amodei, Dario and Brown, Tom "
            "and Clark, Jack and Kaplan, Jared and McCandlish, Sam and Olah, Chris",
            title="A Mathematical Framework for Transformer Circuits",
            journal="Transformer Circuits Thread",
            year="2021",
        ),
        _reference(
            "lee2024grokfast",
            "misc",
            author="Lee, Jaerin and Kang, Bong Gyun and Kim, Kihoon and Lee, Kyoung Mu",
            title="{Grokfast}: Accelerated Grokking by Amplifying Slow Gradients",
            year="2024",
            eprint="2405.20233",
            archiveprefix="arXiv",
        ),
        _reference(
            "prieto2025grokking",
            "inproceedings",
            author="Prieto, Lucas and Barsbey, Melih and Mediano, Pedro A. M. and Birdal, Tolga",
            title="Grokking at the Edge of Numerical Stability",
            year="2025",
            booktitle="International Conference on Learning Representations",
            eprint="2501.04697",
            archiveprefix="arXiv",
        ),
        _reference(
            "jordan2024muon",
            "misc",
            author="Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz "
            "and Newhouse, Laker and Bernstein, Jeremy",
            title="{Muon}: An Optimizer for Hidden Layers in Neural Networks",
            year="2024",
            howpublished="Blog post",
        ),
        _reference(
            "liu2025muon",
            "misc",
            author="Liu, Jingyuan and Su, Jianlin and Yao, Xingcheng and others",
            title="{Muon} is Scalable for {LLM} Training",
            year="2025",
            eprint="2502.16982",
            archiveprefix="arXiv",
        ),
        _reference(
            "bernstein2018signsgd",
            "inproceedings",
            author="Bernstein, Jeremy and Wang, Yu-Xiang and Azizzadenesheli, Kamyar and Anandkumar, Animashree",
            title="{signSGD}: Compressed Optimisation for Non-Convex Problems",
            year="2018",
            booktitle="International Conference on Machine Learning",
            eprint="1802.04434",
            archiveprefix="arXiv",
        ),
        _reference(
            "wilson1927probable",
            "article",
            author="Wilson, Edwin B.",
            title="Probable Inference, the Law of Succession, and Statistical Inference",
            journal="Journal of the American Statistical Association",
            year="1927",
            volume="22",
            number="158",
            pages="209--212",
        ),
        _reference(
            "efron1979bootstrap",
            "article",
            author="Efron, Bradley",
            title="Bootstrap Methods: Another Look at the Jackknife",
            journal="The Annals of Statistics",
            year="1979",
            volume="7",
            number="1",
            pages="1--26",
        ),
        _reference(
            "benjamini1995controlling",
            "article",
            author="Benjamini, Yoav and Hochberg, Yosef",
            title="Controlling the False Discovery Rate: A Practical and Powerful Approach to Multiple Testing",
            journal="Journal of the Royal Statistical Society: Series B",
            year="1995",
            volume="57",
            number="1",
            pages="289--300",
        ),
        _reference(
            "phipson2010permutation",
            "article",
            author="Phipson, Belinda and Smyth, Gordon K.",
            title="Permutation {P}-values Should Never Be Zero: Calculating Exact {P}-values When Permutations "
            "Are Randomly Drawn",
            journal="Statistical Applications in Genetics and Molecular Biology",
            year="2010",
            volume="9",
            number="1",
        ),
    )
}


def references(keys: Iterable[str]) -> tuple[Reference, ...]:
    """The references of these keys, each once, in the order in which they are first named.

    Raises:
        WorkbenchError: a key is not known.
    """
    found = []
    for key in dict.fromkeys(keys):
        if key not in REFERENCES:
            raise WorkbenchError(f"Unknown reference {key!r}. {nearest(key, REFERENCES)}")
        found.append(REFERENCES[key])
    return tuple(found)
