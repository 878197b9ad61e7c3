"""Makes lesson6_handbook.pdf: a ferry company's handbook, of which no model can have read, in two languages, with a table.

    python tests/make_handbook.py DroidSansFallbackFull.ttf lesson6_handbook.pdf    (Debian: fonts-droid-fallback, Apache 2.0)
"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.backends.backend_pdf import PdfPages
matplotlib.rcParams["pdf.fonttype"] = 42
matplotlib.rcParams["pdf.compression"] = 9
font_manager.fontManager.addfont(sys.argv[1])
matplotlib.rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=sys.argv[1]).get_name()]
PAGES = [
("Larkholm Ferry Handbook", """
1. The ferry
The ferry Petrel crosses the sound between Larkholm and Skarv in 35 minutes. She was built in 1998 in Gdansk
and rebuilt in 2016 with two electric motors of 450 kilowatts each. She carries 180 passengers and 24 cars.
The battery is charged at the quay in Larkholm, which takes nine minutes.

2. When the ferry runs
From April to September the first ferry leaves Larkholm at 06:10 and the last at 22:40. From October to March
the last departure is at 20:10. In a wind of more than 22 metres per second all crossings are cancelled.
Cancelled crossings are announced by text message at least one hour before the departure.

3. Bicycles and animals
Bicycles travel free of charge on the lower deck. Dogs are allowed on the upper deck and must be on a leash.
Other animals have to stay in a closed box. Guide dogs may enter every deck.
"""),
("Fares and refunds", """
4. Fares
All fares are in crowns and hold for one crossing. Children under seven travel free.

Ticket                     Single      Return      Ten crossings
Adult                          64            110             480
Student                        45             80             340
Car with driver              210            380           1650
Motorcycle                    95            170             720

5. Refunds
A ticket that was not used can be returned within 14 days at the office in Larkholm. A fee of 15 crowns is kept.
If the company cancels a crossing, the full price is paid back without a fee. Tickets for ten crossings are valid
for two years and cannot be returned once three crossings have been used.

6. Lost property
What is found on board is kept at the office for 60 days. After that it is given to the lifeboat society.
Ask for it by telephone on 0555 0142, on working days from 9 to 15.
"""),
("拉克霍姆渡轮手册（中文部分）", """
7. 安全须知
开船前船员会演示救生衣的穿法。救生衣放在每个座位下面，儿童救生衣放在上层甲板的红色柜子里。
听到七短一长的汽笛声时，乘客应当立即到上层甲板集合。船上禁止吸烟，包括电子烟，违者罚款二百克朗。
下层甲板在航行期间关闭，乘客不得留在车内。

8. 团体与学校
十五人以上的团体可以享受百分之二十的折扣，但必须提前三天预订。
学校的班级在周二和周四免费乘船，每十名学生须有一名教师陪同。
预订请发邮件到渡轮办公室，办公室会在两个工作日之内回复。
"""),
("退款与无障碍服务", """
9. 退款
未使用的船票可以在十四天之内退款，手续费为十五克朗。因天气原因取消的航班全额退款，不收手续费。
退款会在五个工作日之内退回原来的银行卡。丢失的船票不能退款，也不能补办。

10. 无障碍服务
轮椅乘客请在开船前三十分钟到达码头，船员会放下坡道。船上有一部电梯通往上层甲板。
无障碍卫生间位于下层甲板的左侧。陪同轮椅乘客的一名护理人员免费乘船。

11. 船上餐厅
餐厅在上层甲板，供应热汤、三明治和咖啡。鱼汤每份四十八克朗，是按照船长祖母的做法煮的。
餐厅在靠岸前十分钟停止服务。
"""),
]
with PdfPages(sys.argv[2], metadata={"Title": "Larkholm Ferry Handbook", "CreationDate": None}) as pdf:
    for number, (title, text) in enumerate(PAGES, 1):
        figure = plt.figure(figsize=(8.27, 11.69))
        figure.text(0.1, 0.92, title, fontsize=18)
        y = 0.88
        for line in text.strip("\n").split("\n"):
            cells = [c for c in line.split("  ") if c.strip()]
            if len(cells) == 4:
                for x, cell in zip((0.1, 0.4, 0.55, 0.7), cells):
                    figure.text(x, y, cell.strip(), fontsize=8.4)
            else:
                figure.text(0.09, y, line, fontsize=12 if line[:1].isdigit() and len(line) < 30 else 8.4)
            y -= 0.02
        figure.text(0.5, 0.05, f"Larkholm Ferry Company, page {number}", fontsize=8, ha="center")
        pdf.savefig(figure)
