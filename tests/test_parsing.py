"""Answers in plain words of many languages are read, and no letter is read that was not meant."""

import time

import pytest

import vlmneurons as vn
from vlmneurons.errors import QuestionError
from vlmneurons.run.parsing import joined, parse_answer

CITIES = ["Cairo", "Paris", "Rome", "Oslo"]
FOODS = ["Rice", "Rice cake", "Vitamin C", "A dog"]
CUPS = ["2 cups", "4 cups", "6 cups", "8 cups"]
YES = ["Yes", "No"]
NINE = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COUNTED = ["10", "20", "A", "B"]
LETTERED = ["C. Rome", "A. Cairo", "D. Oslo", "B. Paris"]

READ = [
    # marked as the answer
    ("<answer>B</answer>", CITIES, 1),
    ("<answer>(B) Paris</answer>", CITIES, 1),
    ("The tower is tall.\n<answer>\nB\n</answer>", CITIES, 1),
    ("<think>A or C?</think><answer>Paris</answer>", CITIES, 1),
    ("<answer>B</answer> <answer>B.</answer>", CITIES, 1),
    ("It is A or B. <answer>C</answer>", CITIES, 2),
    ("\\boxed{B}", CITIES, 1),
    ("$\\boxed{\\text{C}}$", CITIES, 2),
    ("The final answer is $\\boxed{C}$.", CITIES, 2),
    ("\\boxed{\\mathrm{D}}", CITIES, 3),
    ("\\boxed{B. Paris}", CITIES, 1),
    ("So \\(\\boxed{A}\\).", CITIES, 0),
    ("<|begin_of_box|>B<|end_of_box|>", CITIES, 1),
    ("<answer><|begin_of_box|>B<|end_of_box|></answer>", CITIES, 1),
    # thought, then answered
    ("<think>It could be A.</think>\nC", CITIES, 2),
    ("<think>\n\n</think>\n\nB", CITIES, 1),
    ("Perhaps A, or D.\n</think>\n\nThe answer is B.", CITIES, 1),
    ("[THINK]The answer is A[/THINK]B", CITIES, 1),
    ("◁think▷A?◁/think▷ B. Paris", CITIES, 1),
    ("<thinking>A</thinking><think>D</think>B", CITIES, 1),
    # dressed
    ("**Answer:** B", CITIES, 1),
    ("**Answer: B**", CITIES, 1),
    ("### Answer\n\nAnswer: **B**", CITIES, 1),
    ("> B", CITIES, 1),
    ("$B$", CITIES, 1),
    ("`B`.", CITIES, 1),
    ("“B”", CITIES, 1),
    ("「B」", CITIES, 1),
    ("<B>", CITIES, 1),
    ("B<|im_end|>\n<|im_start|>user\nA?", CITIES, 1),
    ("B</s>", CITIES, 1),
    ("\u200fB\u200e", CITIES, 1),
    ("𝐁", CITIES, 1),
    ("Ⓑ", CITIES, 1),
    ("B.Paris", CITIES, 1),
    ("B (Paris)", CITIES, 1),
    ("Paris (B)", CITIES, 1),
    ("[B] Paris", CITIES, 1),
    ("B Paris", CITIES, 1),
    ("b. paris", CITIES, 1),
    ("D. xxx", CITIES, 3),
    ("B. The tower stands in France.", CITIES, 1),
    ("B) It shows a tower, not a temple (A)", CITIES, 1),
    # English sentences
    ("It is B", CITIES, 1),
    ("It's B.", CITIES, 1),
    ("I think it's B.", CITIES, 1),
    ("I think the answer is B", CITIES, 1),
    ("I would go with B.", CITIES, 1),
    ("I choose option B.", CITIES, 1),
    ("My answer: B. Paris", CITIES, 1),
    ("Answer - B", CITIES, 1),
    ("Answer — B", CITIES, 1),
    ("Answer: (B)", CITIES, 1),
    ("Answer:\n\nB", CITIES, 1),
    ("ASSISTANT: B", CITIES, 1),
    ("The correct letter is B", CITIES, 1),
    ("Choice: B", CITIES, 1),
    ("Answer is option B", CITIES, 1),
    ("The best option is: B", CITIES, 1),
    ("The most likely answer is B.", CITIES, 1),
    ("B is the correct answer", CITIES, 1),
    ("B is right.", CITIES, 1),
    ("Option B is the best answer, since A shows a temple.", CITIES, 1),
    ("Sure! The correct option is B.", CITIES, 1),
    ("Yes, the answer is B.", CITIES, 1),
    ("Based on the image, the answer is **B. Paris**", CITIES, 1),
    ("Based on the picture, the correct option is B.", CITIES, 1),
    ("Looking at the tower I would say that the answer is B.", CITIES, 1),
    ("The tower is in France, so the answer is B.", CITIES, 1),
    ("The answer to the question is B.", CITIES, 1),
    ("The answer is B, not A.", CITIES, 1),
    ("The answer is B (not A).", CITIES, 1),
    ("The answer is B because A and C are temples.", CITIES, 1),
    ("The answer is C, because A is not correct and B is not correct", CITIES, 2),
    ("Option B is correct, not option A.", CITIES, 1),
    ("It is not A, it is option C.", CITIES, 2),
    ("I considered (A), but it is incorrect. Final answer: D.", CITIES, 3),
    ("The answer is A at first sight. Final answer: D", CITIES, 3),
    ("Therefore, the answer is B.\n\nHowever, A is also plausible.", CITIES, 1),
    ("B) Paris is the capital, so A) Cairo is wrong", CITIES, 1),
    ("A. Cairo\nB. Paris\nC. Rome\nD. Oslo\nAnswer: C", CITIES, 2),
    ("B\n\nExplanation: A is wrong", CITIES, 1),
    ("The tower is French.\nB", CITIES, 1),
    ("B\n\nQuestion: What is this?\nA. Tea\nB. Rice\nAnswer: A", CITIES, 1),
    ("Question: Which city?\nAnswer: B", CITIES, 1),
    ("the answer is b", CITIES, 1),
    ("The answer is a.", CITIES, 0),
    ("A is correct.", CITIES, 0),
    ("The answer is A because of the temple", CITIES, 0),
    ("I believe the answer is I.", NINE, 8),
    ("I think the answer is B", NINE, 1),
    ("I", NINE, 8),
    # numbers
    ("Option 2", CITIES, 1),
    ("The answer is 2.", CITIES, 1),
    ("2. Paris", CITIES, 1),
    ("2) Paris", CITIES, 1),
    ("答案是2", CITIES, 1),
    ("정답은 2번입니다", CITIES, 1),
    ("उत्तर २ है", CITIES, 1),
    ("10", COUNTED, 0),
    ("A", COUNTED, 0),
    ("I see 2 cups", CUPS, 0),
    # texts
    ("I think it's Rome", CITIES, 2),
    ("The answer is Paris, not Rome", CITIES, 1),
    ("No, it is not.", YES, 1),
    ("Yes, it is.", YES, 0),
    ("It is a rice cake.", FOODS, 1),
    ("It is Vitamin C.", FOODS, 2),
    ("C'est Paris.", CITIES, 1),
    ("A. Cairo", LETTERED, 1),
    ("B. A. Cairo", LETTERED, 1),
    ("A. B", ["B", "A", "D", "C"], 0),
]

NOT_READ = [
    # several letters, or all of them
    ("A or B", CITIES),
    ("A/B", CITIES),
    ("A & B", CITIES),
    ("A, B", CITIES),
    ("A and B", CITIES),
    ("A o B", CITIES),
    ("A ou B", CITIES),
    ("A e B", CITIES),
    ("A und B", CITIES),
    ("A atau B", CITIES),
    ("A和B", CITIES),
    ("AとB", CITIES),
    ("A와 B", CITIES),
    ("A أو B", CITIES),
    ("A या B", CITIES),
    ("答案是A或B", CITIES),
    ("答案是A、B", CITIES),
    ("La respuesta es A o B.", CITIES),
    ("A resposta é A ou B.", CITIES),
    ("La réponse est A ou B.", CITIES),
    ("The answer is A and B.", CITIES),
    ("The answer is either A or B.", CITIES),
    ("The answer is A, or B.", CITIES),
    ("The answer is A, B", CITIES),
    ("The answer is B, but it could be A", CITIES),
    ("The answer is B. The answer is C.", CITIES),
    ("(A) or (B)", CITIES),
    ("(A), (B) and (C)", CITIES),
    ("Both A and B", CITIES),
    ("A, B, C and D are all plausible.", CITIES),
    ("A. Cairo\nB. Paris\nC. Rome", CITIES),
    ("B. Paris\nC. Rome", CITIES),
    ("A) Cairo B) Paris C) Rome D) Oslo", CITIES),
    ("Options: A. Cairo", CITIES),
    ("Choose A, B, C, or D.", CITIES),
    ("Answer with the option's letter: A, B, C or D", CITIES),
    ("<answer>A</answer><answer>B</answer>", CITIES),
    ("\\boxed{A} or \\boxed{B}", CITIES),
    ("<answer>A or B</answer>", CITIES),
    ("<answer></answer> B", CITIES),
    # denied
    ("Not B.", CITIES),
    ("The answer is not B.", CITIES),
    ("The answer isn't B.", CITIES),
    ("It is not B", CITIES),
    ("It cannot be B.", CITIES),
    ("B is wrong.", CITIES),
    ("B is not correct.", CITIES),
    ("(B) is incorrect", CITIES),
    ("B. is wrong", CITIES),
    ("B) Paris is not the answer", CITIES),
    ("Option B is incorrect.", CITIES),
    ("The wrong answer is B.", CITIES),
    ("I don't think the answer is B.", CITIES),
    ("It is false that the answer is B.", CITIES),
    ("Neither A nor B", CITIES),
    ("We can eliminate option B.", CITIES),
    ("Not the answer: B", CITIES),
    ("La respuesta no es B.", CITIES),
    ("No es la B", CITIES),
    ("No creo que la respuesta es B", CITIES),
    ("La réponse n'est pas B.", CITIES),
    ("Ce n'est pas B", CITIES),
    ("A resposta não é B.", CITIES),
    ("Die Antwort ist nicht B.", CITIES),
    ("La risposta non è B", CITIES),
    ("Răspunsul nu este B", CITIES),
    ("Svaret er ikke B", CITIES),
    ("Ответ не B", CITIES),
    ("Отговорът не е B", CITIES),
    ("答案不是B", CITIES),
    ("不选B", CITIES),
    ("答えはBではありません", CITIES),
    ("Bは正しくない", CITIES),
    ("답은 B가 아닙니다", CITIES),
    ("الإجابة ليست B", CITIES),
    ("الإجابة مش B", CITIES),
    ("जवाब B नहीं है", CITIES),
    ("উত্তর B নয়", CITIES),
    ("جواب B نہیں ہے", CITIES),
    ("பதில் B அல்ல", CITIES),
    ("సమాధానం B కాదు", CITIES),
    ("පිළිතුර B නොවේ", CITIES),
    ("መልሱ B አይደለም", CITIES),
    ("Jawabannya bukan B", CITIES),
    ("Hindi B ang sagot", CITIES),
    ("Jibu si B", CITIES),
    ("Igisubizo si B", CITIES),
    ("Azịza abụghị B", CITIES),
    ("Deebiin B miti", CITIES),
    ("Ní B an freagra", CITIES),
    ("N'eo ket B ar respont", CITIES),
    ("Хариулт нь B биш", CITIES),
    ("คำตอบไม่ใช่ B", CITIES),
    ("Câu trả lời không phải B", CITIES),
    # doubted, conditional, asked, taken back
    ("Maybe B", CITIES),
    ("It could be B.", CITIES),
    ("It might be B", CITIES),
    ("Perhaps the answer is B.", CITIES),
    ("If it is a church, the answer is B.", CITIES),
    ("I'm not sure, but the answer is B.", CITIES),
    ("I doubt the answer is B.", CITIES),
    ("Suppose the answer is B.", CITIES),
    ("One possible answer is B.", CITIES),
    ("Is it B?", CITIES),
    ("B?", CITIES),
    ("Is the answer B", CITIES),
    ("Is B correct?", CITIES),
    ("答案是B吗", CITIES),
    ("答えはBですか", CITIES),
    ("¿Es B?", CITIES),
    ("क्या उत्तर B है", CITIES),
    ("Tal vez la respuesta es B", CITIES),
    ("Mungkin jawabannya B", CITIES),
    ("可能答案是B", CITIES),
    ("A. Actually, the answer is B.", CITIES),
    ("The answer is B. Wait, that is wrong.", CITIES),
    ("B. No wait, C.", CITIES),
    ("The answer is B. Sorry, it is C.", CITIES),
    # contradicted
    ("A. Paris", CITIES),
    ("Paris (A)", CITIES),
    ("The answer is A. Paris", CITIES),
    ("The answer is (A) Paris.", CITIES),
    ("B Rome", CITIES),
    ("A. Rice cake", FOODS),
    ("B", LETTERED),
    ("(B)", LETTERED),
    ("The answer is B. Rome", CITIES),
    ("B\nThe answer is A.", CITIES),
    # no such option
    ("E", CITIES),
    ("The answer is E", CITIES),
    ("(F)", CITIES),
    ("5", CITIES),
    ("Option 7", CITIES),
    ("None of the above", CITIES),
    ("All of the above", CITIES),
    # letters that are words, or belong to something else
    ("A man is walking", CITIES),
    ("A cat is shown in the picture.", CITIES),
    ("A", ["B. Cairo", "A. Paris"]),
    ("The answer is a", CITIES),
    ("The answer is a dog", CITIES),
    ("Answer a question", CITIES),
    ("I think", NINE),
    ("I, as an assistant, cannot tell.", NINE),
    ("I see a man.", NINE),
    ("C'est à Lyon", CITIES),
    ("à", CITIES),
    ("a la derecha", CITIES),
    ("A la izquierda hay un hombre", CITIES),
    ("A imagem mostra um templo", CITIES),
    ("A foto é bonita", CITIES),
    ("E a resposta", NINE),
    ("A resposta", CITIES),
    ("A resposta correta", CITIES),
    ("A correct answer", CITIES),
    ("A final answer", CITIES),
    ("O homem", NINE),
    ("A. A. Milne", CITIES),
    ("C. S. Lewis wrote it", CITIES),
    ("B. B. King", CITIES),
    ("D.C.", CITIES),
    ("B.C.", CITIES),
    ("A.M.", CITIES),
    ("A's", CITIES),
    ("A+", CITIES),
    ("C++", CITIES),
    ("C#", CITIES),
    ("B-flat", CITIES),
    ("D-Day", CITIES),
    ("B12", CITIES),
    ("Vitamin C", CITIES),
    ("Plan B", CITIES),
    ("Blood type: B", CITIES),
    ("Grade: A", CITIES),
    ("Hepatitis B", CITIES),
    ("The sign shows the letter B.", CITIES),
    ("The label on it is B", CITIES),
    ("I looked at option B.", CITIES),
    ("Option A shows a building.", CITIES),
    ("Figure (A) shows a man", CITIES),
    ("B is", CITIES),
    ("B is the", CITIES),
    ("Bは", CITIES),
    ("The answer to question A is unclear", CITIES),
    ("Ответ: В", CITIES),  # the Cyrillic letter: the third of its alphabet, and B's double
    # unfinished thought
    ("<think>The answer is B.", CITIES),
    ("<think>\nB", CITIES),
    ("<think>A</think><think>B", CITIES),
    ("[THINK]B", CITIES),
    # numbers that are none
    ("2 of them", CITIES),
    ("2\n3", CITIES),
    ("1. Cairo\n2. Paris", CITIES),
    ("1. The picture shows a temple.", CITIES),
    ("The answer is 2", CUPS),
    ("2.5", CITIES),
    ("10:30", CITIES),
    ("2 or 3", CITIES),
    # texts that are denied, doubted, asked, or are not answers
    ("It is not Paris", CITIES),
    ("I don't think it is Paris", CITIES),
    ("No es París, sino otra", ["París", "Roma"]),
    ("Ce n'est pas Paris", CITIES),
    ("Das ist nicht Paris", CITIES),
    ("यह Paris नहीं है", CITIES),
    ("不是Paris", CITIES),
    ("Is it Paris?", CITIES),
    ("It could be Paris", CITIES),
    ("Cairo or Paris", CITIES),
    ("I have no idea", YES),
    ("There is no doubt about it", YES),
    ("I cannot answer", CITIES),
    ("", CITIES),
    ("...", CITIES),
    ("The second option", CITIES),
]

LANGUAGES = {
    "Amharic": ["መልሱ B ነው", "ትክክለኛው መልስ B ነው።", "መልስ፦ B"],
    "Arabic": ["الإجابة هي B", "الإجابة الصحيحة هي B.", "الجواب: B", "الخيار B هو الصحيح"],
    "Bengali": ["উত্তর: B", "সঠিক উত্তর হল B", "উত্তর হলো B।", "সঠিক উত্তর B"],
    "Breton": ["Ar respont eo B", "Respont: B", "B eo ar respont"],
    "Bulgarian": ["Отговорът е B", "Верният отговор е B.", "Отговор: B"],
    "Chinese": ["答案是B", "正确答案是B。", "选B", "答案:B", "正確答案為 B", "根据图片,正确答案是B", "答案应该是B", "B是正确的"],
    "Egyptian Arabic": ["الاجابة هي B", "الإجابة الصح هي B", "الاختيار الصح B"],
    "Filipino": ["Ang sagot ay B", "Ang tamang sagot ay B.", "Sagot: B", "B ang tamang sagot"],
    "French": ["La réponse est B", "La bonne réponse est B.", "Réponse : B", "C'est B", "B est la bonne réponse"],
    "German": ["Antwort: B", "Die richtige Antwort ist B.", "Die Antwort lautet B"],
    "Hindi": ["उत्तर: B", "सही उत्तर B है।", "सही विकल्प B है", "जवाब B है", "विकल्प B सही है"],
    "Igbo": ["Azịza bụ B", "Azịza ziri ezi bụ B.", "Azịza: B"],
    "Indonesian": ["Jawabannya adalah B", "Jawaban yang benar adalah B.", "Jawaban: B", "Jawabannya B", "B adalah jawaban yang benar"],
    "Irish": ["Is é B an freagra", "An freagra ceart ná B", "Freagra: B", "Is é an freagra ceart ná B."],
    "Italian": ["La risposta è B", "Risposta: B", "La risposta corretta è la B."],
    "Japanese": ["答えはBです", "正解はBです。", "答え:B", "Bが正解です", "正しい答えはBです", "写真から、正解はBです"],
    "Javanese": ["Jawabane yaiku B", "Wangsulan: B", "Jawaban sing bener yaiku B."],
    "Kinyarwanda": ["Igisubizo ni B", "Igisubizo cy'ukuri ni B.", "Igisubizo: B"],
    "Korean": ["답은 B입니다", "정답: B", "정답은 B입니다.", "B가 정답입니다", "정답은 B 입니다", "올바른 답은 B입니다"],
    "Malay": ["Jawapannya ialah B", "Jawapan: B", "Jawapan yang betul ialah B."],
    "Marathi": ["उत्तर: B", "योग्य उत्तर B आहे", "बरोबर पर्याय B आहे."],
    "Minangkabau": ["Jawabannyo adolah B", "Jawaban: B", "Jawaban nan batua adolah B."],
    "Mongolian": ["Хариулт: B", "Зөв хариулт нь B", "Зөв хариулт бол B юм."],
    "Norwegian": ["Svaret er B", "Det riktige svaret er B.", "Svar: B", "Riktig svar er B"],
    "Oromo": ["Deebiin B dha", "Deebiin sirriin B dha.", "Deebii: B"],
    "Portuguese": ["A resposta é B", "A resposta correta é A", "Resposta: B", "A alternativa correta é a B.", "A opção B é a correta"],
    "Romanian": ["Răspunsul este B", "Răspunsul corect este B.", "Răspuns: B"],
    "Russian": ["Ответ: B", "Правильный ответ: B.", "Правильный ответ — B", "Правильным ответом является B"],
    "Sinhala": ["පිළිතුර: B", "නිවැරදි පිළිතුර B වේ", "පිළිතුර වන්නේ B ය."],
    "Spanish": ["La respuesta es B.", "La respuesta correcta es la B", "Respuesta: B", "Es la B", "La opción correcta es B."],
    "Sundanese": ["Jawabanna nyaéta B", "Waleran: B", "Jawaban anu leres nyaéta B."],
    "Swahili": ["Jibu ni B", "Jibu sahihi ni B.", "Jibu: B"],
    "Tamil": ["பதில்: B", "சரியான பதில் B", "சரியான விடை B ஆகும்."],
    "Telugu": ["సమాధానం: B", "సరైన సమాధానం B", "సరైన సమాధానం B."],
    "Thai": ["คำตอบคือ B", "คำตอบที่ถูกต้องคือ B", "ข้อ B"],
    "Turkish": ["Cevap: B", "Doğru cevap B"],
    "Urdu": ["جواب: B", "صحیح جواب B ہے۔", "درست جواب B ہے"],
    "Vietnamese": ["Đáp án là B", "Câu trả lời đúng là B."],
}


@pytest.mark.parametrize(("text", "options", "expected"), READ)
def test_an_answer_in_plain_words_is_read(text, options, expected):
    assert parse_answer(text, options) == expected


@pytest.mark.parametrize(("text", "options"), NOT_READ)
def test_no_option_is_read_where_none_or_several_are_named_or_one_is_denied_or_doubted(text, options):
    assert parse_answer(text, options) is None


@pytest.mark.parametrize(("language", "text"), [(name, text) for name, texts in LANGUAGES.items() for text in texts])
def test_an_answer_is_read_in_the_languages_of_cvqa(language, text):
    letter = "A" if text.endswith("é A") else "B"
    assert parse_answer(text, CITIES) == "AB".index(letter)
    # The same sentence with two letters, one outside of the options, or as a question names no option.
    if letter == "B":
        assert [parse_answer(text.replace("B", other), CITIES) for other in "ACD"] == [0, 2, 3]
    for other in ("B/C", "B & C", "(B) (C)", "Z", "B, D"):
        if letter == "B":
            assert parse_answer(text.replace("B", other), CITIES) is None
    assert parse_answer(text.rstrip(".。।۔።") + "?", CITIES) is None


@pytest.mark.parametrize("place", range(4))
def test_every_letter_is_read_alike_whatever_stands_at_its_option(place):
    letter = "ABCD"[place]
    for shape in ("{}", "({})", "{}.", "**{}**", "The answer is {}.", "答案是{}", "{} is correct", "Answer: {}"):
        assert parse_answer(shape.format(letter), CITIES) == place, shape
        assert parse_answer(shape.format(letter), ["w", "x", "y", "z"]) == place, shape


def test_no_english_word_of_one_letter_is_taken_for_an_option_in_running_text():
    text = "A man walks, I think, to a market. I like it. A woman sells o a."
    for n in range(2, 15):
        assert parse_answer(text, [f"option {chr(96 + i)}x" for i in range(n)]) is None


def test_reading_a_text_takes_no_long_time_whatever_it_holds():
    began = time.perf_counter()
    for text in ("answer " * 2000, "(" * 5000, " " * 5000 + "B", "not " * 2000 + "Paris", "B, " * 1500, "答案" * 2000,
                 "the answer is B " * 500, "A. Paris\n" * 500, "B (Paris " * 300, "\\boxed{" * 2000):  # fmt: skip
        assert parse_answer(text, CITIES) in (None, 0, 1)
    assert time.perf_counter() - began < 20


def test_what_is_no_text_and_a_question_without_options_is_refused(unchecked):
    with pytest.raises(QuestionError, match="text is a text; got 3"):
        vn.parse_answer(3, CITIES)
    with pytest.raises(QuestionError, match="there are no options that the text could name"):
        vn.parse_answer("B", [])


def test_characters_join_to_words_by_their_scripts():
    assert joined("a", "b")
    assert joined("a", "\u0301")
    assert not joined("a", " ")
    assert not joined("", "a")
    assert not joined("B", "입")
    assert joined("आ", "ल")
